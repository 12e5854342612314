"""One optimizer step of any objective, and the state that a checkpoint saves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from soflow_core.alignment import Alignment, AlignmentTerm
from soflow_core.augmentation import augmentation
from soflow_core.dropout import dropout
from soflow_core.ema import EMA, Exponential
from soflow_core.gradient_sync import GradientSync, Local, all_gather, with_whole
from soflow_core.host_copy import HostCopy, PendingCopy, map_tensors
from soflow_core.kernels import fast_bfloat16, step_kernels
from soflow_core.networks.base import NetworkModule
from soflow_core.objectives.base import Batch, Draws, Loss, Objective
from soflow_core.optimizer import OptimizerConfig
from soflow_core.passes import Network, PassPolicy, Precision
from soflow_core.rank_check import check_replicas
from soflow_core.recorded_passes import RecordedPasses
from soflow_core.sharding import (
    compile_blocks,
    is_first,
    local,
    on_every_rank,
    sharding_mesh,
    split_like,
    split_slots,
    substituted,
    whole,
)
from soflow_core.step_checks import (
    check_combination,
    check_conditions,
    check_graphs,
    check_recompute,
    check_shapes,
)
from soflow_core.step_record import StartedStep, StepRecord, culprit, read
from soflow_core.update import Update

MOST_GRAPHS = 32
"""Limit of compiled versions of a network: one for each pass, branch size, precision and gradient mode. Beyond
torch's own limit of 8 a network would run uncompiled.
"""


@dataclass(frozen=True)
class TrainStepConfig:
    """Settings of a training beside its network and objective."""

    total_steps: int
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema_decays: tuple[float, ...] = (0.9999,)
    power_ema_widths: tuple[float, ...] = ()
    """Relative widths of power-function EMAs, kept beside those of `ema_decays`."""
    ema_every: int = 1
    """Steps between two updates of all averages, each with the factors of so many steps."""
    precision: Precision | Literal["auto"] = "auto"
    """`auto` is `mixed` where the device multiplies bfloat16 in hardware, and else `float32`."""
    clip_norm: float | None = None
    """Largest norm of all gradients together; None does not clip."""
    accumulate: int = 1
    """Strided pieces that the rows are taken in, one backward pass each, for less memory."""
    recompute: bool = False
    """Runs the network's blocks again in the backward pass: less memory, a forward pass more for each pass with gradient."""
    compile: bool = False
    graphs: bool = False
    """Records a step on a GPU as CUDA graphs, passes and update, and replays them: for networks whose kernels are shorter than their
    launches.
    """
    deterministic: bool = False
    """Lets a step use deterministic kernels alone (`torch.use_deterministic_algorithms`), also in the backward
    pass. On a GPU cuBLAS needs the environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8, set before the process
    first uses the GPU.
    """
    seed: int = 0
    """Of dropout and augmentation, which are a function of it, the step, the rank and the piece."""
    augment: float | None = None
    """Probability of each augmentation of a network with augmentation labels; None is no augmentation."""

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"accumulate is {self.accumulate}; a step has at least 1 piece")
        if self.ema_every < 1:
            raise ValueError(f"ema_every is {self.ema_every}; averages are updated each 1 or more steps")
        if self.total_steps < 1:
            raise ValueError(f"total_steps is {self.total_steps}; a training has at least 1 step")


class TrainStep:
    """Network, optimizer, EMAs and step count of one training; a call makes one step.

    `network` is the plain one on its device; `sync` wraps it where several ranks train it. Ranks that hold
    replicas compare parameters and gradients in their first step, which raises RuntimeError where they differ.
    Where the network is sharded, all ranks must call `state_dict`, `ema_state`, `host_state` and
    `host_ema_state` together.

    A call waits for the device, to say whether the step was taken. `start` and `finish` do the same for many steps, so that a GPU
    is never without work between them.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        config: TrainStepConfig,
        sync: GradientSync | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        self.sync = sync or Local()
        check_combination(objective, network, self.sync, alignment is not None, bool(config.augment))
        check_conditions(objective, network)
        self.objective = objective
        self.config = config
        self.module = network
        self.network = self.sync.wrap(network)
        self.mesh = sharding_mesh(self.network)
        self.step = 0
        self._pending: PendingCopy | None = None
        """A copy of the state before the next update, which waits for it."""
        self._replicas_compared = not self.sync.replicated
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        """Of the network, which are averaged."""
        self.device = self.parameters[0].device
        self.alignment = None if alignment is None else self._alignment(alignment)
        head = {} if self.alignment is None else dict(self.alignment.head.named_parameters())
        self.all_names = [*self.names, *(f"alignment head {name}" for name in head)]
        self.all_parameters = [*self.parameters, *head.values()]
        """Of the network, and behind them those of the alignment head: what is trained."""
        self.optimizer = config.optimizer.build(self.all_parameters)
        teacher_decay = objective.teacher_decay
        decays = config.ema_decays
        if teacher_decay is not None and teacher_decay not in decays:
            decays = (*decays, teacher_decay)
        if teacher_decay is not None and config.ema_every > 1:
            raise ValueError(
                f"{objective.method} has a teacher, an average of every step: set ema_every to 1, it is {config.ema_every}"
            )
        self.ema = EMA(trained, decays, config.power_ema_widths, config.ema_every)
        self.update = Update(self.all_parameters, self.parameters, self.optimizer, self.ema, config.clip_norm)
        drops = isinstance(network, NetworkModule) and network.dropout_share > 0
        self.policy = PassPolicy(
            self._precision(),
            # Masks of dropout and augmentation labels belong to the rows of a pass.
            skip_unused=self.device.type == "cpu" and not config.compile and not drops and not config.augment,
            separate=drops,
            teacher=None if teacher_decay is None else self._averaged(teacher_decay),
            uniform=self.mesh is not None,
        )
        if config.recompute:
            check_recompute(objective, network)
            cast(NetworkModule, network).checkpoint_blocks = True
        if config.compile:
            compile_blocks(self.module)
        self.recorded: RecordedPasses | None = None
        """Where the passes are recorded."""
        if config.graphs:
            by_host = {
                "dropout": drops,
                "augmentation": bool(config.augment),
                "alignment": alignment is not None,
            }
            check_graphs(objective, self.device, self.sync, by_host)
            self.recorded = RecordedPasses(self._passes, self.all_parameters)
            self.update.record()
        fused = bool(self.optimizer.defaults.get("fused"))
        self.runs_ahead = fused and self.mesh is None and self.device.type == "cuda"
        """Whether `start` returns before the device has done the step: a fused optimizer can leave out an update by itself."""
        self._started: list[StartedStep] = []
        self._records: list[StepRecord] = []
        """Of started steps that were done at once."""

    def __call__(self, batch: Batch, draws: Draws) -> StepRecord:
        """Makes one step on this rank's rows. Raises ValueError after the last of `total_steps`."""
        self._check_finished()
        rate = self._learning_rate()
        with self._kernels():
            values, gradients = self._gradients(batch, draws)
            norm = whole(get_total_norm(gradients, foreach=True))
            # The only wait for the device in a step: whether everything is finite decides about the update.
            *numbers, grad_norm = torch.stack([*values.values(), norm]).tolist()
            terms = dict(zip(values, numbers, strict=True))
            if not math.isfinite(grad_norm):
                return self._refuse(terms, grad_norm, rate)
            self._hold()
            self.update(norm, rate, self.step + 1)
            self.step += 1
        return StepRecord.of(self.step, terms, grad_norm, rate)

    def start(self, batch: Batch, draws: Draws) -> None:
        """Makes one step as a call does, its record kept for `finish`; where `runs_ahead`, without waiting for the device.

        The device leaves out the update of a step that is not finite, and those of all steps started after it.
        """
        if not self.runs_ahead:
            record = self(batch, draws)
            self._records.append(record)
            return
        rate = self._learning_rate()
        with self._kernels():
            values, _ = self._gradients(batch, draws)
            named = [
                name
                for name, p in zip(self.all_names, self.all_parameters, strict=True)
                if p.grad is not None
            ]
            self._hold()
            passes = None if self.recorded is None else self.recorded.recording
            norms = self.update.ahead(rate, self.step + 1, passes)
            self._started.append(StartedStep.of(self.step, rate, values, named, norms))
            self.step += 1

    def finish(self) -> list[StepRecord]:
        """Waits for the started steps; their records since the last call, in order, up to the first refused one.

        After a refused step the training is where it was before it.
        """
        records, self._records = self._records, []
        started, self._started = self._started, []
        records += read(started)
        if records and not records[-1].finite:
            self.step = records[-1].step
            self.update.refused.zero_()
            self.optimizer.zero_grad(set_to_none=True)
        return records

    def adopt(self, objective: Objective, optimizer: OptimizerConfig) -> None:
        """Goes on with other loss weights, schedules and learning rate from the next step.

        Raises ValueError, without any change, where another method, network or optimizer would be needed.
        """
        before = self.objective
        for name in ("method", "teacher_decay", "uses_jvp", "compares_images"):
            if getattr(objective, name) != getattr(before, name):
                raise ValueError(
                    f"{name} is {getattr(before, name)} in this training and cannot become {getattr(objective, name)}"
                )
        if replace(self.config.optimizer, lr=optimizer.lr, final_lr=optimizer.final_lr) != optimizer:
            raise ValueError("of the optimizer, lr and final_lr alone can change in a training")
        check_conditions(objective, self.module)
        self.objective = objective
        if self.recorded is not None:
            self.recorded.forget()
        self.config = replace(self.config, optimizer=optimizer)

    def ema_state(self, decay: float | str | None = None) -> dict[str, Tensor]:
        """The network's state with averaged parameters, of an EMA given by decay or name, by default the first.

        Later steps change its tensors; `host_ema_state` copies them.
        """
        return {name: whole(tensor) for name, tensor in self._ema_shares(decay).items()}

    @contextmanager
    def averaged(self, decay: float | str | None = None) -> Iterator[nn.Module]:
        """Context in which the network has the parameters of an EMA, given as for `ema_state`.

        Only passes without gradient may run in it; the trained parameters are back afterwards.
        """
        self._check_finished()
        self._hold()
        name = Exponential(decay).name if isinstance(decay, float) else decay
        with substituted(self.parameters, list(self.ema.average(name).values())):
            yield self.module

    def state_dict(self) -> dict[str, Any]:
        """State from which another TrainStep continues as this one would, with full tensors.

        Later steps change its tensors; `host_state` copies them.
        """
        state: dict[str, Any] = map_tensors(self._shares(), whole)
        return state

    def host_state(self, copy: HostCopy | None = None) -> dict[str, Any]:
        """Copy of `state_dict()` in host memory, which can be written while training goes on.

        Of a sharded network the first rank gets the copy, and the others get {}. `copy` provides the memory, and
        its previous content is overwritten.
        """
        return self._to_host(self._shares(), copy)

    def start_host_state(self, copy: HostCopy | None = None) -> PendingCopy:
        """As `host_state`, copied by a thread while the next step computes its gradients; its update waits for the copy.

        Of a sharded network, whose copy is a collective, it is complete when this returns.
        """
        self._hold()
        if self.mesh is not None:
            return PendingCopy(self.host_state(copy))
        self._pending = (HostCopy() if copy is None else copy).start(self._shares())
        return self._pending

    def host_ema_state(
        self, decay: float | str | None = None, copy: HostCopy | None = None
    ) -> dict[str, Tensor]:
        """Copy of `ema_state(decay)` in host memory, as `host_state` is of `state_dict`."""
        return self._to_host(self._ema_shares(decay), copy)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state, made on any number of ranks.

        Method and total_steps must be the same, because averages and schedules depend on them; the optimizer's
        settings stay those of this TrainStep. Raises ValueError, without any change, where the state does not fit.
        """
        method = state.get("method", self.objective.method)
        if method != self.objective.method:
            raise ValueError(
                f"the state is of {method}, this training is {self.objective.method}; to start from its weights, load"
                " them into the network"
            )
        if state["total_steps"] != self.config.total_steps:
            raise ValueError(
                f"the state is of {state['total_steps']} total steps, this training of {self.config.total_steps};"
                " schedules depend on the total, so resume with the same"
            )
        self._check_finished()
        self._hold()
        current = self.module.state_dict()
        check_shapes(state["network"], current)
        if self.alignment is not None and "alignment" in state:
            check_shapes(state["alignment"], self.alignment.head.state_dict())
        self.ema.check(state["ema"])
        self.module.load_state_dict(
            {name: split_like(t, current[name]) for name, t in state["network"].items()}
        )
        self._load_head(state.get("alignment"))
        # An alignment head is behind the network: its moments are left out where there is none here, and begin anew where the state
        # has none.
        slots = split_slots(state["optimizer"]["state"], self.all_parameters)
        self.optimizer.load_state_dict(
            {"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )
        self.update.forget()
        self.ema.load_state_dict(state["ema"])
        self.step = state["step"]

    def _check_finished(self) -> None:
        if self._started:
            raise RuntimeError(f"{len(self._started)} steps are under way; call finish() first")

    def _learning_rate(self) -> float:
        """Of the next step. Raises ValueError after the last of `total_steps`."""
        if self.step >= self.config.total_steps:
            raise ValueError(
                f"all {self.config.total_steps} steps are done, and schedules end there; give a larger total_steps"
            )
        return self.config.optimizer.learning_rate(self.step, self.config.total_steps)

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Context in which the step's kernels are those of its precision, compiled if asked for."""
        tf32 = self.policy.precision != "float32" and not self.objective.needs_true_float32
        with self._compiler(), step_kernels(self.device, tf32, self.config.deterministic):
            yield

    def _gradients(self, batch: Batch, draws: Draws) -> tuple[Mapping[str, Tensor], list[Tensor]]:
        """Loss and terms, each the mean over the pieces, and all gradients, reduced over ranks."""
        self._check_batch(batch)
        batch = batch.to(self.device)
        if self.objective.compares_images and not isinstance(self.sync, Local):
            batch = with_whole(batch)
        draws = draws.to(self.device)
        values: Mapping[str, Tensor]
        if self.recorded is None:
            values = self._passes(batch, draws)
        else:
            place = self.step, self.config.total_steps
            scheduled = self.objective.schedules(*place)
            assert scheduled is not None, "check_graphs has seen to it"
            values = self.recorded(self.objective.phase(*place), batch, draws, scheduled)
        gradients = [p.grad for p in self.all_parameters if p.grad is not None]
        self.sync.reduce(gradients)
        if not self._replicas_compared:
            self._replicas_compared = True
            check_replicas(self.all_names, self.all_parameters, all_gather)
        return values, gradients

    def _passes(
        self, batch: Batch, draws: Draws, schedules: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """This rank's gradients, set anew; -> loss and terms, each the mean over the pieces."""
        pieces = _pieces(batch, draws, self.config.accumulate)
        seed = self.config.seed
        policy = self.policy if schedules is None else replace(self.policy, schedules=schedules)
        self.optimizer.zero_grad(set_to_none=True)
        losses: dict[str, list[Tensor]] = {"loss": []}
        for number, (piece, drawn) in enumerate(pieces, start=1):
            with (
                self.sync.accumulation(self.network, last=number == len(pieces)),
                dropout(self.module, seed, self.step, number),
                augmentation(self.module, piece, self.config.augment, (seed, self.step, number)) as given,
            ):
                self._backward(given, drawn, policy, losses)
        return {name: torch.stack(parts).mean() for name, parts in losses.items()}

    def _compiler(self) -> AbstractContextManager[object]:
        return (
            torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS) if self.config.compile else nullcontext()
        )

    def _backward(
        self, batch: Batch, draws: Draws, policy: PassPolicy, values: dict[str, list[Tensor]]
    ) -> None:
        """Adds a piece's part of the mean to the gradients, and appends its loss and terms to `values`."""
        result = self._loss(batch, draws, policy)
        named = {"loss": result.loss, **result.terms}
        for name, value in named.items():
            values.setdefault(name, []).append(value.detach().float())
        # A factor of NaN makes every gradient NaN, on this rank and, after the reduction, on all of them. (Given to `backward` as its
        # seed it would be compared in shape by torch's symbolic shapes, whose import takes half a second.)
        healthy = torch.isfinite(torch.stack([parts[-1] for parts in values.values()])).all()
        share = torch.full_like(result.loss, 1 / self.config.accumulate)
        (result.loss * torch.where(healthy, share, math.nan)).backward()

    def _loss(self, batch: Batch, draws: Draws, policy: PassPolicy) -> Loss:
        """The objective's loss, with the alignment term where there is one."""
        arguments = self.network, batch, draws, self.step, self.config.total_steps, policy
        term = self.alignment
        if term is None:
            return self.objective.loss(*arguments)
        with term.tapped(self.module) as tap:
            result = self.objective.loss(*arguments)
        aligned = term.loss(tap, batch.x0)
        terms = {**result.terms, "alignment_loss": aligned.detach()}
        return Loss(result.loss + term.settings.weight * aligned, terms)

    def _alignment(self, settings: Alignment) -> AlignmentTerm:
        """The alignment term with its head on the device. Raises ValueError where the network has no such block."""
        if not isinstance(self.module, NetworkModule):
            raise ValueError("alignment needs a NetworkModule, whose blocks have tokens")
        term = AlignmentTerm(settings, self.module.config, self.config.seed)
        term.head.to(self.device)
        return term

    def _precision(self) -> Precision:
        if self.config.precision != "auto":
            return self.config.precision
        return "mixed" if fast_bfloat16(self.device) else "float32"

    def _averaged(self, decay: float) -> Network:
        """Function that runs the network with the current parameters of an EMA."""
        average = self.ema.average(Exponential(decay).name)

        def network(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
            if self.mesh is None:
                return cast(Tensor, functional_call(self.module, average, (x, t, s, labels)))
            # A sharded network gathers what its parameters hold, not what functional_call passes in.
            with substituted(self.parameters, list(average.values())):
                return cast(Tensor, self.module(x, t, s, labels))

        return network

    def _shares(self) -> dict[str, Any]:
        """`state_dict()` with this rank's shards of tensors."""
        self._check_finished()
        return {
            "step": self.step,
            "total_steps": self.config.total_steps,
            "method": self.objective.method,
            "network": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            **({} if self.alignment is None else {"alignment": self.alignment.head.state_dict()}),
        }

    def _ema_shares(self, decay: float | str | None) -> dict[str, Tensor]:
        self._check_finished()
        name = Exponential(decay).name if isinstance(decay, float) else decay
        return {**self.module.state_dict(), **self.ema.average(name)}

    def _hold(self) -> None:
        """Wait until the state may be changed."""
        if self._pending is not None:
            self._pending.hold()
            self._pending = None

    def _to_host(self, shares: dict[str, Any], copy: HostCopy | None) -> dict[str, Any]:
        keep = self.mesh is None or is_first(self.mesh)
        state: dict[str, Any] = (HostCopy() if copy is None else copy).take(shares, keep)
        return state

    def _load_head(self, state: Mapping[str, Tensor] | None) -> None:
        """Loads an alignment head where the state and this training have one: a training may begin or end to align on its way."""
        if self.alignment is not None and state is not None:
            self.alignment.head.load_state_dict(state)

    def _check_batch(self, batch: Batch) -> None:
        """Raises ValueError for labels of a network without classes, which would ignore them."""
        unlabelled = isinstance(self.module, NetworkModule) and self.module.config.classes is None
        if unlabelled and batch.labels is not None:
            raise ValueError("the batch has labels and the network has no classes; give Batch(x0) alone")

    def _refuse(self, terms: dict[str, float], grad_norm: float, rate: float) -> StepRecord:
        """Record of a step without update. The culprit is the first non-finite term, the loss, or a gradient."""
        finite = torch.stack(
            [
                torch.isfinite(local(p.grad)).all()
                if p.grad is not None
                else torch.ones((), dtype=torch.bool, device=self.device)
                for p in self.all_parameters
            ]
        )
        finite = on_every_rank(finite, self.mesh)
        bad = [name for name, is_finite in zip(self.all_names, finite.tolist(), strict=True) if not is_finite]
        self.optimizer.zero_grad(set_to_none=True)
        return StepRecord.of(self.step, terms, grad_norm, rate, culprit(terms, bad, len(self.all_names)))


def _pieces(batch: Batch, draws: Draws, count: int) -> list[tuple[Batch, Draws]]:
    """Splits the rows into pieces for accumulation. Raises ValueError where they do not divide.

    Piece j of n has rows j, j + n, j + 2 n, ..., as a rank's rows of a batch are, so that each piece has its part
    of the velocity rows.
    """
    rows = len(batch.x0)
    if rows % count:
        raise ValueError(
            f"{rows} rows do not divide into {count} equal pieces; give a rank a multiple of accumulate rows"
        )
    return [(batch.rows(j, count), draws.rows(j, count)) for j in range(count)]
