"""Flow Matching (arXiv 2210.02747) with SiT's settings (arXiv 2401.08740): the network predicts the velocity."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from soflow_core.guidance import draw_dropped, drop_labels
from soflow_core.objectives.base import (
    DEFAULT_POLICY,
    Batch,
    Draws,
    Loss,
    dropped_rows,
)
from soflow_core.objectives.step_times import SteppedModel
from soflow_core.passes import Network, Passes, PassPolicy
from soflow_core.paths import PATHS
from soflow_core.random_source import RandomSource
from soflow_core.registration import part_setting, register
from soflow_core.rows import row_mean
from soflow_core.samplers.base import VelocitySampler, check_sampler, sampler
from soflow_core.samplers.ode import guided_prediction
from soflow_core.settings import check_drop, setting
from soflow_core.times import TimeDistribution


@register("flow_matching")
@dataclass(frozen=True)
class FlowMatching(SteppedModel):
    """Settings of Flow Matching; the defaults are SiT's."""

    path: str = part_setting(PATHS, "linear")
    """A registered path."""
    time: TimeDistribution | None = None
    """Distribution of t; None is uniform on (0, 1)."""
    drop: float = 0.1
    """Probability that a sample's label is replaced by the null label, for guidance at sampling."""
    sampler: str = setting("euler", sampling=True)
    """A solver of the velocity; `heun` makes two evaluations a step."""
    sampling_scale: float = setting(1.0, sampling=True)
    """Guidance scale at sampling; 1 is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_drop("drop", self.drop)
        check_sampler(self, VelocitySampler, self.sampler)  # type: ignore[type-abstract]
        if self.sampling_scale != 1 and self.drop == 0:
            raise ValueError(
                "sampling_scale needs an unconditional prediction; set drop above 0 or sampling_scale to 1"
            )

    @property
    def needs_null_label(self) -> bool:
        return self.drop > 0

    @property
    def used_sampler(self) -> VelocitySampler:
        return sampler(VelocitySampler, self.sampler)  # type: ignore[type-abstract]

    def phase(self, step: int, total_steps: int) -> Hashable:
        del step, total_steps
        return None

    def schedules(self, step: int, total_steps: int) -> Mapping[str, float]:
        del step, total_steps
        return {}

    def draw_from(self, source: RandomSource, sample_shape: tuple[int, ...], conditional: bool) -> Draws:
        noise = source.normal(*sample_shape)
        t = source.uniform() if self.time is None else self.time.from_normal(source.normal())
        dropped = draw_dropped(source, self.drop)
        return Draws(noise, t, t, dropped if conditional else None, velocity_rows=len(source.rows))

    def loss(
        self,
        network: Network,
        batch: Batch,
        draws: Draws,
        step: int,
        total_steps: int,
        policy: PassPolicy = DEFAULT_POLICY,
    ) -> Loss:
        del step, total_steps
        path = PATHS.named(self.path)(draws.t)
        x_t = path.state(batch.x0, draws.noise)
        target = path.velocity(batch.x0, draws.noise)
        labels = None if batch.labels is None else drop_labels(batch.labels, dropped_rows(draws))
        prediction = Passes(network, policy).low_precision(x_t, draws.t, draws.t, labels)
        mse = row_mean((prediction - target).square()).mean()
        return Loss(mse, {"velocity_mse": mse.detach()})

    def sample(
        self,
        network: Network,
        noise: Tensor,
        labels: Tensor | None,
        steps: int,
        renoise: Sequence[Tensor] = (),
    ) -> Tensor:
        del renoise

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return guided_prediction(network, x, t, labels, self.sampling_scale)

        return self.used_sampler.sample(velocity, noise, self.step_times(steps))
