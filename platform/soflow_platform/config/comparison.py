"""Settings of `comparison`: the ways of sampling in which `soflowctl compare` scores the methods of a sweep."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from soflow_core.objectives import OBJECTIVES
from soflow_platform.config.sections import Positive, Section, Steps


class SamplingConfig(Section):
    """One way of sampling, and the methods that are sampled in it."""

    methods: tuple[str, ...] | None = None
    """None: every method of the sweep."""
    steps: Annotated[tuple[Steps, ...], Field(min_length=1, max_length=64)]
    """Numbers of sampling steps, each scored."""
    sampler: str | None = None
    """Of methods that have several; None: the trial's own."""
    sampling_scale: float | None = None
    """Guidance at sampling, of methods that have it; None: the trial's own."""
    sampling_interval: tuple[float, float] | None = None
    """Guidance interval at sampling, of methods that have it; None: the trial's own."""
    sampling_times: tuple[float, ...] | None = None
    """Times at which the steps end, one fewer than `steps`, of methods that have them; None: the trial's own."""
    sampling_grid: str | None = None
    """Time grid of the steps, of methods that have one; None: the trial's own."""
    labels: Literal["balanced", "uniform"] | None = None
    """Which labels samples get: every class equally often, or drawn; None: `evaluation.labels`."""
    samples: Positive | None = None
    """Images that are scored; None: `evaluation.samples`."""

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...] | None) -> tuple[str, ...] | None:
        unknown = [method for method in methods or () if method not in OBJECTIVES]
        if unknown:
            raise ValueError(f"there is no method {unknown[0]!r}; known are {', '.join(OBJECTIVES)}")
        return methods

    @model_validator(mode="after")
    def _times_fit_the_steps(self) -> SamplingConfig:
        if self.sampling_times is not None and self.steps != (len(self.sampling_times) + 1,):
            times, steps = list(self.sampling_times), len(self.sampling_times) + 1
            raise ValueError(f"sampling_times {times} make {steps} steps: give steps: [{steps}]")
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling settings that replace the trial's own."""
        given = {
            "sampler": self.sampler,
            "sampling_scale": self.sampling_scale,
            "sampling_interval": self.sampling_interval,
            "sampling_times": self.sampling_times,
            "sampling_grid": self.sampling_grid,
        }
        return {name: value for name, value in given.items() if value is not None}

    def covers(self, method: str) -> bool:
        """Whether this method is sampled so."""
        return self.methods is None or method in self.methods


USUAL_COMPARISON = (SamplingConfig(steps=(1, 2, 4)),)
