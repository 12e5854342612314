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

from soflow_core.agreement import Gather, first_difference
from soflow_core.ema import EMA, Exponential
from soflow_core.objectives.base import Batch, Draws, Objective
from soflow_core.optimizer import OptimizerConfig
from soflow_core.passes import Network, PassPolicy, Precision
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
from soflow_core.states import HostCopy, map_tensors

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
        precision: Precision | Literal["auto"] = "float32",
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
        _check_combination(objective, wrapped, self.mesh is not None, compile, exchanged)
        if accumulate < 1:
            raise ValueError(f"accumulate is {accumulate}; a step has at least 1 piece")
        self.network = network
        self.module = cast(nn.Module, network.module) if wrapped else network
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
            precision = (
                "mixed" if self.device.type == "cuda" or _fast_bfloat16_cpu(self.device) else "float32"
            )
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
        if compile and self.mesh is not None:
            compile_blocks(self.module)
        elif compile:
            self.module.compile(dynamic=False)

    def __call__(self, batch: Batch, draws: Draws) -> StepRecord:
        """One step on this rank's rows."""
        pieces = self._pieces(batch.to(self.device), draws.to(self.device))
        rate = self.optimizer_config.learning_rate(self.step, self.total_steps)
        with self._compiler(), _kernels(self.device, self.policy, self.deterministic):
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
            if not torch.isfinite(norm):
                return self._refuse(values, norm, rate)
            if self.clip_norm is not None:
                clip_grads_with_norm_(self.parameters, self.clip_norm, norm, foreach=True)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.step += 1
            self.ema.update(self.parameters, self.step)
        return self._record(values, norm, rate)

    def ema_state(self, decay: float | str | None = None) -> dict[str, Tensor]:
        """The network's state with the averaged parameters: of this decay, of an EMA's name, or of the first
        EMA.
        """
        return {name: whole(tensor) for name, tensor in self._ema_shares(decay).items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later TrainStep needs to go on as this one would, in whole tensors."""
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

        Its total_steps must be the same, because schedules depend on it. The optimizer's settings stay those
        given here.
        """
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the state is of {state['total_steps']} total steps, this training of {self.total_steps};"
                " schedules depend on the total, so resume with the same"
            )
        own = self.module.state_dict()
        self.module.load_state_dict(
            {name: split_like(t, own[name]) if name in own else t for name, t in state["network"].items()}
        )
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

    def _record(
        self, values: dict[str, Tensor], norm: Tensor, rate: float, culprit: str | None = None
    ) -> StepRecord:
        named = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
        loss = named.pop("loss")
        return StepRecord(self.step, loss, named, float(norm), rate, finite=culprit is None, culprit=culprit)

    def _refuse(self, values: dict[str, Tensor], norm: Tensor, rate: float) -> StepRecord:
        """No update: the first non-finite term is the culprit, then the loss, then a parameter's gradient."""
        finite = torch.isfinite(torch.stack(list(values.values()))).tolist()
        broken = [name for name, good in zip(values, finite, strict=True) if not good]
        gradients = [p.grad for p in self.parameters]
        good = torch.stack(
            [
                torch.isfinite(local(g)).all() if g is not None else norm.new_ones((), dtype=torch.bool)
                for g in gradients
            ]
        )
        good = on_every_rank(good, self.mesh)
        bad = [name for name, fine in zip(self.names, good.tolist(), strict=True) if not fine]
        if broken:
            culprit = next((name for name in broken if name != "loss"), "loss")
        else:
            culprit = (
                f"gradient of {bad[0]}" if 0 < len(bad) < len(self.names) else "gradients of all parameters"
            )
        self.optimizer.zero_grad(set_to_none=True)
        return self._record(values, norm, rate, culprit)


def _check_combination(
    objective: Objective, wrapped: bool, sharded: bool, compile: bool, exchanged: bool
) -> None:
    """Refuses what does not go together: of a method, a wrapped or sharded network, and a caller's own exchange
    between ranks.
    """
    if objective.uses_jvp and wrapped:
        raise ValueError(
            f"{objective.method} takes a Jacobian-vector product, which DistributedDataParallel has not;"
            " pass the plain network and reduce_gradients"
        )
    if objective.uses_jvp and compile:
        raise ValueError(f"{objective.method} takes a Jacobian-vector product; train it with compile=False")
    if sharded and exchanged:
        raise ValueError(
            "a sharded network averages its own gradients, and its ranks hold different shares of them;"
            " leave out reduce_gradients and gather"
        )


def _fast_bfloat16_cpu(device: torch.device) -> bool:
    """Whether this is a CPU with matrix units for bfloat16; others emulate it, slower than float32."""
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


@contextmanager
def _kernels(device: torch.device, policy: PassPolicy, deterministic: bool) -> Iterator[None]:
    """TF32 for the float32 passes of a reduced precision on a GPU, and deterministic kernels if asked; put
    back afterwards.
    """
    tf32 = device.type == "cuda" and policy.precision != "float32"
    matmul = torch.get_float32_matmul_precision()
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        if tf32:
            torch.set_float32_matmul_precision("high")
        if deterministic:
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        # Setting even the same precision again is a change to the compiler, which would compile all anew.
        if tf32:
            torch.set_float32_matmul_precision(matmul)
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
