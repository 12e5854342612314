"""One optimizer step of any objective, with everything a checkpoint of it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from soflow_core.ema import EMA, Exponential
from soflow_core.host_copy import HostCopy, map_tensors
from soflow_core.kernels import fast_bfloat16, step_kernels
from soflow_core.networks.dit import DiT
from soflow_core.objectives.base import Batch, Draws, Objective
from soflow_core.optimizer import OptimizerConfig
from soflow_core.passes import Network, PassPolicy, Precision
from soflow_core.rank_check import Gather, first_difference
from soflow_core.sharding import (
    compile_blocks,
    is_first,
    local,
    on_every_rank,
    sharding_mesh,
    split_like,
    substituted,
    whole,
)

MOST_GRAPHS = 32
"""Compiled versions of a network: one for each pass, size of branch, precision and gradient mode. Torch's own
limit is 8, after which it goes on uncompiled.
"""

__all__ = ["OptimizerConfig", "StepRecord", "TrainStep"]


@dataclass(frozen=True)
class StepRecord:
    """What one step did. A step that was refused (`finite` is False) changed nothing, and `culprit` names the
    term.
    """

    step: int
    """Finished steps, this one included if it was taken."""
    loss: float
    """Mean over this rank's rows."""
    terms: dict[str, float]
    """Each the mean over the pieces that have it."""
    grad_norm: float
    """Of all gradients together, before clipping."""
    learning_rate: float
    """Of this step."""
    finite: bool = True
    culprit: str | None = None


class TrainStep:
    """Owns network, optimizer, EMAs and step count; a call makes one step.

    `precision` "auto" is mixed where bfloat16 is fast, on a GPU or a CPU with matrix units, and else float32.

    Many ranks: `network` is wrapped in DistributedDataParallel, or sharded (`soflow_core.sharding.shard`), or
    `reduce_gradients` averages the gradients over the ranks in place, which objectives with a Jacobian-vector
    product need on a network that is not sharded. With `gather`, the first step compares parameters and
    gradients of all ranks and raises RuntimeError where they differ. A call, `state_dict`, `ema_state`,
    `host_state` and `host_ema_state` of a sharded network are for all ranks at once.

    `accumulate` takes the rows in so many strided pieces, one backward pass each, for less memory.

    `deterministic` lets a step use deterministic kernels alone (`torch.use_deterministic_algorithms`, also in
    the backward pass) and puts the setting back. On a GPU cuBLAS asks for the environment variable
    CUBLAS_WORKSPACE_CONFIG=:4096:8, set before the process first uses the GPU.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        optimizer: OptimizerConfig,
        total_steps: int,
        ema_decays: Sequence[float] = (0.9999,),
        precision: Precision | Literal["auto"] = "auto",
        clip_norm: float | None = None,
        compile: bool = False,
        reduce_gradients: Callable[[list[Tensor]], None] | None = None,
        power_ema_widths: Sequence[float] = (),
        deterministic: bool = False,
        accumulate: int = 1,
        gather: Gather | None = None,
    ) -> None:
        wrapped = isinstance(network, DistributedDataParallel)
        self.mesh = sharding_mesh(network)
        exchanged = reduce_gradients is not None or gather is not None
        _check_combination(objective, wrapped, self.mesh is not None, exchanged)
        if accumulate < 1:
            raise ValueError(f"accumulate is {accumulate}; a step has at least 1 piece")
        if total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}; a training has at least 1 step")
        self.network = network
        self.module = cast(nn.Module, network.module) if wrapped else network
        _check_labels(objective, self.module)
        self.objective = objective
        self.optimizer_config = optimizer
        self.total_steps = total_steps
        self.clip_norm = clip_norm
        self.reduce_gradients = reduce_gradients
        self.deterministic = deterministic
        self.accumulate = accumulate
        self.gather = gather
        self.compile = compile
        self.step = 0
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        self.device = self.parameters[0].device
        if precision == "auto":
            precision = "mixed" if fast_bfloat16(self.device) else "float32"
        self.optimizer = optimizer.build(self.parameters)
        teaches = objective.teacher_decay
        if teaches is not None and teaches not in ema_decays:
            ema_decays = (*ema_decays, teaches)
        self.ema = EMA(trained, ema_decays, power_ema_widths)
        self.policy = PassPolicy(
            precision,
            skip_unused=self.device.type == "cpu" and not compile,
            teacher=None if teaches is None else self._averaged(teaches),
            uniform=self.mesh is not None,
        )
        if compile:
            compile_blocks(self.module)

    def __call__(self, batch: Batch, draws: Draws) -> StepRecord:
        """One step on this rank's rows. Raises ValueError after the last of `total_steps`."""
        if self.step >= self.total_steps:
            raise ValueError(
                f"all {self.total_steps} steps are done, and schedules end there; give a larger total_steps"
            )
        self._check_batch(batch)
        pieces = self._pieces(batch.to(self.device), draws.to(self.device))
        rate = self.optimizer_config.learning_rate(self.step, self.total_steps)
        tf32 = self.policy.precision != "float32"
        with self._compiler(), step_kernels(self.device, tf32, self.deterministic):
            self.optimizer.zero_grad(set_to_none=True)
            losses: dict[str, list[Tensor]] = {"loss": []}
            for number, piece in enumerate(pieces, start=1):
                with self._exchange(last=number == len(pieces)):
                    self._backward(*piece, losses)
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            if self.reduce_gradients is not None:
                self.reduce_gradients(gradients)
            if self.gather is not None:
                self._compare_ranks(self.gather)
            values = {name: torch.stack(parts).mean() for name, parts in losses.items()}
            norm = whole(get_total_norm(gradients, foreach=True))
            # The one wait for the device in a step: the update must know whether it may happen.
            *told, grad_norm = torch.stack([*values.values(), norm]).tolist()
            terms = dict(zip(values, told, strict=True))
            if not math.isfinite(grad_norm):
                return self._refuse(terms, grad_norm, rate)
            if self.clip_norm is not None:
                clip_grads_with_norm_(self.parameters, self.clip_norm, norm, foreach=True)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.step += 1
            self.ema.update(self.parameters, self.step)
        return self._record(terms, grad_norm, rate)

    def ema_state(self, decay: float | str | None = None) -> dict[str, Tensor]:
        """The network's state with the averaged parameters: of this decay, of an EMA's name, or of the first
        EMA. Later steps change its tensors; `host_ema_state` copies.
        """
        return {name: whole(tensor) for name, tensor in self._ema_shares(decay).items()}

    @contextmanager
    def averaged(self, decay: float | str | None = None) -> Iterator[nn.Module]:
        """The network with the parameters of an EMA, named as for `ema_state`, in its own memory. Only passes
        without gradient may run inside; training goes on afterwards as if there had been none.
        """
        name = Exponential(decay).name if isinstance(decay, float) else decay
        with substituted(self.parameters, list(self.ema.average(name).values())):
            yield self.module

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later TrainStep needs to go on as this one would, in whole tensors.

        Later steps change them; `host_state` copies.
        """
        state: dict[str, Any] = map_tensors(self._shares(), whole)
        return state

    def host_state(self, copy: HostCopy | None = None) -> dict[str, Any]:
        """A copy of `state_dict()` in host memory, which later steps do not change, to be written meanwhile.

        Of a sharded network the first rank gets it, tensor after tensor, and the others get {}. `copy` gives
        the memory; its former state is written over.
        """
        return self._to_host(self._shares(), copy)

    def host_ema_state(
        self, decay: float | str | None = None, copy: HostCopy | None = None
    ) -> dict[str, Tensor]:
        """A copy of `ema_state(decay)` in host memory, as `host_state` is of `state_dict`."""
        return self._to_host(self._ema_shares(decay), copy)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, whatever number of ranks it was made on.

        Its method and total_steps must be the same, because its averages and schedules depend on them. The
        optimizer's settings stay those given here. A state that is refused, with ValueError, changes nothing.
        """
        method = state.get("method", self.objective.method)
        if method != self.objective.method:
            raise ValueError(
                f"the state is of {method}, this training is {self.objective.method}; to start from its weights, load"
                " them into the network"
            )
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the state is of {state['total_steps']} total steps, this training of {self.total_steps};"
                " schedules depend on the total, so resume with the same"
            )
        own = self.module.state_dict()
        _check_shapes(state["network"], own)
        self.ema.check(state["ema"])
        self.module.load_state_dict({name: split_like(t, own[name]) for name, t in state["network"].items()})
        self.optimizer.load_state_dict(self._split_optimizer(state["optimizer"]))
        self.ema.load_state_dict(state["ema"])
        self.step = state["step"]

    def _compiler(self) -> AbstractContextManager[object]:
        return torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS) if self.compile else nullcontext()

    def _pieces(self, batch: Batch, draws: Draws) -> list[tuple[Batch, Draws]]:
        """Piece j of n has rows j, j + n, j + 2 n, ..., as a rank's share of a batch has, so that each holds its
        part of the velocity rows.
        """
        rows, count = len(batch.x0), self.accumulate
        if rows % count:
            raise ValueError(
                f"{rows} rows do not divide into {count} equal pieces; give a rank a multiple of accumulate rows"
            )
        return [(batch.rows(j, count), draws.rows(j, count)) for j in range(count)]

    def _exchange(self, last: bool) -> AbstractContextManager[None]:
        """DistributedDataParallel sums over the ranks in the last piece alone. A sharded network sums in each: a
        rank has no room for whole gradients between them.
        """
        if last or not isinstance(self.network, DistributedDataParallel):
            return nullcontext()
        return cast(AbstractContextManager[None], self.network.no_sync())

    def _backward(self, batch: Batch, draws: Draws, values: dict[str, list[Tensor]]) -> None:
        """Adds a piece's share of the mean to the gradients, and its loss and terms to `values`."""
        result = self.objective.loss(self.network, batch, draws, self.step, self.total_steps, self.policy)
        named = {"loss": result.loss, **result.terms}
        for name, value in named.items():
            values.setdefault(name, []).append(value.detach().float())
        # A seed of NaN makes every gradient NaN, on this rank and, after the reduction, on all of them.
        healthy = torch.isfinite(torch.stack([parts[-1] for parts in values.values()])).all()
        share = torch.full_like(result.loss, 1 / self.accumulate)
        result.loss.backward(torch.where(healthy, share, math.nan))

    def _compare_ranks(self, gather: Gather) -> None:
        """Raises on every rank where parameters, or gradients after the reduction, are not the same on all."""
        self.gather = None
        name = first_difference(self.names, self.parameters, gather)
        if name is not None:
            raise RuntimeError(f"{name} differs between ranks; start all with the same weights")
        name = first_difference(self.names, [p.grad for p in self.parameters], gather)
        if name is not None:
            raise RuntimeError(
                f"the gradient of {name} differs between ranks after the reduction, which must leave the same mean"
                " on all of them"
            )

    def _averaged(self, decay: float) -> Network:
        """The network with the parameters of an EMA, whatever they are when it is called."""
        average = self.ema.average(Exponential(decay).name)

        def network(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
            if self.mesh is None:
                return cast(Tensor, functional_call(self.module, average, (x, t, s, labels)))
            # What a sharded network gathers is what its parameters hold, whatever a call hands in.
            with substituted(self.parameters, list(average.values())):
                return cast(Tensor, self.module(x, t, s, labels))

        return network

    def _shares(self) -> dict[str, Any]:
        """`state_dict()` in this rank's shares of tensors."""
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "method": self.objective.method,
            "network": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def _ema_shares(self, decay: float | str | None) -> dict[str, Tensor]:
        name = Exponential(decay).name if isinstance(decay, float) else decay
        return {**self.module.state_dict(), **self.ema.average(name)}

    def _to_host(self, shares: dict[str, Any], copy: HostCopy | None) -> dict[str, Any]:
        keep = self.mesh is None or is_first(self.mesh)
        state: dict[str, Any] = (HostCopy() if copy is None else copy).take(shares, keep)
        return state

    def _split_optimizer(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """An optimizer's state with moments as this network's parameters are split, and this optimizer's
        settings. Nothing in it shares memory with the state given.
        """

        def split(value: Any, parameter: Tensor) -> Any:
            if not isinstance(value, Tensor):
                return value
            return (split_like(value, parameter) if value.shape == parameter.shape else value).clone()

        slots = {
            index: {key: split(value, self.parameters[index]) for key, value in values.items()}
            for index, values in state["state"].items()
        }
        return {"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]}

    def _check_batch(self, batch: Batch) -> None:
        """A network without classes would leave labels out, and its guidance would guide by nothing."""
        unlabelled = isinstance(self.module, DiT) and self.module.config.classes is None
        if unlabelled and batch.labels is not None:
            raise ValueError("the batch has labels and the network has no classes; give Batch(x0) alone")

    def _record(
        self, terms: dict[str, float], grad_norm: float, rate: float, culprit: str | None = None
    ) -> StepRecord:
        others = {name: value for name, value in terms.items() if name != "loss"}
        return StepRecord(
            self.step, terms["loss"], others, grad_norm, rate, finite=culprit is None, culprit=culprit
        )

    def _refuse(self, terms: dict[str, float], grad_norm: float, rate: float) -> StepRecord:
        """No update: the first non-finite term is the culprit, then the loss, then a parameter's gradient."""
        broken = [name for name, value in terms.items() if not math.isfinite(value)]
        good = torch.stack(
            [
                torch.isfinite(local(p.grad)).all()
                if p.grad is not None
                else torch.ones((), dtype=torch.bool, device=self.device)
                for p in self.parameters
            ]
        )
        good = on_every_rank(good, self.mesh)
        bad = [name for name, fine in zip(self.names, good.tolist(), strict=True) if not fine]
        if broken:
            culprit = next((name for name in broken if name != "loss"), "loss")
        elif not bad:
            culprit = "gradient norm"
        else:
            culprit = f"gradient of {bad[0]}" if len(bad) < len(self.names) else "gradients of all parameters"
        self.optimizer.zero_grad(set_to_none=True)
        return self._record(terms, grad_norm, rate, culprit)


def _check_shapes(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Two states of one network."""
    for name in sorted(given.keys() | own.keys()):
        here, there = own.get(name), given.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (there, here)]
            raise ValueError(
                f"{name} is {shapes[0]} in the state and {shapes[1]} in the network; build the same network"
            )


def _check_labels(objective: Objective, module: nn.Module) -> None:
    """A dropped label needs its row in the network's table."""
    if not isinstance(module, DiT) or module.config.classes is None or module.config.null_label:
        return
    if objective.needs_null_label:
        raise ValueError(
            f"{objective.method} drops labels or guides, and this network has no null label; build it with null_label=True"
        )


def _check_combination(objective: Objective, wrapped: bool, sharded: bool, exchanged: bool) -> None:
    """Refuses what does not go together: of a method, a wrapped or sharded network, and a caller's own exchange
    between ranks.
    """
    if objective.uses_jvp and wrapped:
        raise ValueError(
            f"{objective.method} takes a Jacobian-vector product, which DistributedDataParallel has not;"
            " pass the plain network and reduce_gradients"
        )
    if sharded and exchanged:
        raise ValueError(
            "a sharded network averages its own gradients, and its ranks hold different shares of them;"
            " leave out reduce_gradients and gather"
        )
