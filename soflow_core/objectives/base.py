"""Interface of a training method: `draw_from` (the randomness of a step), `loss` and `sample`.

A method is a frozen dataclass of its settings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from soflow_core.passes import Network, PassPolicy, Scheduled
from soflow_core.random_source import GeneratorSource, RandomSource
from soflow_core.registration import Registry
from soflow_core.samplers.base import Sampler
from soflow_core.settings import STRICT

DrawsT = TypeVar("DrawsT", bound="Draws")

DEFAULT_POLICY = PassPolicy()


@dataclass
class Batch:
    """Data of one step: x0 (B, C, H, W) float32 and labels (B,) int64 or None."""

    x0: Tensor
    labels: Tensor | None = None
    whole: Batch | None = None
    """The batch of all ranks that these rows are some of; None where they are all rows."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        whole = None if self.whole is None else self.whole.to(device)
        return Batch(self.x0.to(device, non_blocking=True), labels, whole)

    def rows(self, part: int, parts: int) -> Batch:
        """Rows part, part + parts, part + 2 parts, ... of the whole batch."""
        labels = None if self.labels is None else self.labels[part::parts]
        return Batch(self.x0[part::parts], labels, self if self.whole is None else self.whole)


@dataclass(frozen=True)
class Draws:
    """Randomness of one step, one row for each sample of the global batch.

    The leading `velocity_rows` rows train the velocity (s = t), the others the method's condition between t and s.
    A rank takes every world-th row, so that all ranks together have the rows of a single process.
    """

    noise: Tensor
    """x1 (B, C, H, W), standard normal."""
    t: Tensor
    """(B,)"""
    s: Tensor
    """(B,), equal to t in the leading rows."""
    dropped: Tensor | None
    """(B,) bool: rows whose label is dropped; None where no label is dropped."""
    velocity_rows: int
    scale: Tensor | None = None
    """(B,): guidance scale of each row, 1 where the label is dropped; with the first and last time of its interval (B, 3), where that
    varies; None where one scale is trained."""

    def rows(self: DrawsT, rank: int, world: int) -> DrawsT:
        """Rows rank, rank + world, rank + 2 world, ... of the global batch."""
        changes: dict[str, Any] = {name: value[rank::world] for name, value in self.tensors().items()}
        return replace(self, **changes, velocity_rows=len(range(rank, self.velocity_rows, world)))

    def to(self: DrawsT, device: torch.device | str) -> DrawsT:
        """The same draws on another device."""
        changes: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in self.tensors().items()}
        return replace(self, **changes)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass
class Loss:
    """Scalar to differentiate, and detached scalars to log."""

    loss: Tensor
    terms: dict[str, Tensor]


class Objective(ABC):
    """Training method; subclasses are frozen dataclasses of its settings.

    `draw_from` makes all randomness of a step; `loss` and `sample` make none. Rows of a
    batch do not know their numbers in the loss: a rank takes every n-th of them, and the mean of the ranks' losses is the loss of
    all. Images of other rows are in `Batch.whole`, for a method that declares `compares_images`. The leading `velocity_rows` rows train
    the velocity: s = t, or as near as the method goes. `loss` calls the
    network through `Passes` alone, which knows precision, teacher and the rows that may be skipped; where the policy is
    `uniform` it makes the same passes whatever its rows are, for each is a collective of all ranks.
    `soflow_core.conformance` checks all of it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    method: str
    """Name of the method in sweep files and weights headers, given by `@register`."""
    fixed_settings: ClassVar[frozenset[str]] = frozenset()
    """Numbers among the settings that stay for a whole training: those that decide what the network's times mean."""

    @classmethod
    def registration_fault(cls, part: type[Objective]) -> str | None:
        """What is wrong with a registered method; None where nothing is."""
        if part.draw is Objective.draw and part.draw_from is Objective.draw_from:
            return "draws no noise and no times: define draw_from"
        settings = {each.name for each in fields(part)}  # type: ignore[arg-type]
        if settings & {"drop", "guidance"} and part.needs_null_label is Objective.needs_null_label:
            return (
                "drops labels (`drop`, `guidance`) and does not say so: define the property needs_null_label"
            )
        return None

    @property
    def needs_null_label(self) -> bool:
        """Whether a conditional network needs a row for the dropped label."""
        return False

    @property
    def conditions_on_scale(self) -> bool:
        """Whether a conditional network needs the guidance scale as a condition."""
        return False

    @property
    def conditions_on_interval(self) -> bool:
        """Whether a conditional network needs the guidance interval as a condition beside the scale."""
        return False

    @property
    def uses_velocity_head(self) -> bool:
        """Whether the loss needs a network with a second head, for the velocity."""
        return False

    @property
    def uses_jvp(self) -> bool:
        """Whether the loss takes a forward-mode derivative of the network, which DDP and flash attention lack."""
        return False

    @property
    def compares_images(self) -> bool:
        """Whether the loss of a row depends on other images of the batch, which `Batch.whole` holds on every rank."""
        return False

    @property
    def needs_true_float32(self) -> bool:
        """Whether the matrix products of high-precision passes must be float32 on a GPU under `mixed`, where they would be TF32."""
        return False

    @property
    def trained_guidance(self) -> float | None:
        """Guidance scale of the training target, 1 without guidance; None for a method that has no such setting.

        Of a network that is trained on a range of scales it is the one that is sampled.
        """
        return None

    @property
    def sampled_interval(self) -> tuple[float, float] | None:
        """Guidance interval that a network with one as a condition is sampled at; None where it is no condition."""
        return None

    @property
    def teacher_decay(self) -> float | None:
        """Decay of the EMA that computes the targets; None where the trained network does."""
        return None

    def phase(self, step: int, total_steps: int) -> Hashable:
        """Phase of the schedules after `step` steps: the steps of one phase make the same passes of the network.

        Each step is a phase of its own where a method does not say more, so that each is counted.
        """
        del total_steps
        return step

    def schedules(self, step: int, total_steps: int) -> Mapping[str, float] | None:
        """Values of the schedules after `step` steps, by name, where the steps of a phase differ in nothing else; None: not said.

        `loss` reads them by `scheduled`. The steps of a method that does not say cannot be recorded (`TrainStepConfig.graphs`).
        """
        del step, total_steps
        return None

    def scheduled(self, policy: PassPolicy, step: int, total_steps: int) -> Scheduled:
        """The values of `schedules`, or what stands for them on the device where the step is recorded."""
        if policy.schedules is not None:
            return policy.schedules
        return self.schedules(step, total_steps) or {}

    @property
    def used_sampler(self) -> Sampler | None:
        """The sampler that `sample` uses, which says how many evaluations a number of steps costs; None where it has no such part."""
        return None

    def draw_from(self, source: RandomSource, sample_shape: tuple[int, ...], conditional: bool) -> Draws:
        """Randomness of one step for the source's rows, on its device. Only conditional training drops labels."""
        raise NotImplementedError(f"{self.method} does not draw from sources")

    def draw(
        self,
        generator: torch.Generator | None,
        batch_size: int,
        sample_shape: tuple[int, ...],
        conditional: bool,
    ) -> Draws:
        """Randomness of one step of a global batch, on the CPU."""
        return self.draw_from(GeneratorSource(generator, batch_size), sample_shape, conditional)

    @property
    def draws_by_rows(self) -> bool:
        """Whether the method draws from any source; one with its own `draw` draws from a generator alone."""
        return type(self).draw is Objective.draw

    @abstractmethod
    def loss(
        self,
        network: Network,
        batch: Batch,
        draws: Draws,
        step: int,
        total_steps: int,
        policy: PassPolicy = DEFAULT_POLICY,
    ) -> Loss:
        """Mean loss of these rows, after `step` finished steps of `total_steps`."""

    @abstractmethod
    def sample(
        self,
        network: Network,
        noise: Tensor,
        labels: Tensor | None,
        steps: int,
        renoise: Sequence[Tensor] = (),
    ) -> Tensor:
        """Noise (B, C, H, W) -> x0 (B, C, H, W) in `steps` steps; renoise[i] is added between steps i and i + 1."""


OBJECTIVES: Registry[Objective] = Registry("training method", Objective, "method")  # type: ignore[type-abstract]
"""Method name -> objective."""


def logged(value: float | Tensor, device: torch.device) -> Tensor:
    """-> (): a term of a loss, without a copy from the host, which a GPU would be waited for."""
    return value if isinstance(value, Tensor) else torch.full((), value, device=device)


def dropped_rows(draws: Draws) -> Tensor:
    """(B,) bool: rows whose label is dropped. Raises ValueError for draws of unconditional training."""
    if draws.dropped is None:
        raise ValueError("labels came with draws of unconditional training; draw with conditional=True")
    return draws.dropped
