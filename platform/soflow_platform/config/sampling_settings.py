"""Settings of `sampling`: how trained networks are sampled, which is no part of the training; and a method with such settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from soflow_core.objectives import Objective
from soflow_core.settings import SAMPLING, marked
from soflow_platform.config import parts  # noqa: F401 - how pydantic reads the sections of a method
from soflow_platform.config.sections import Section, Steps
from soflow_platform.errors import UserError


class SamplingSection(Section):
    """How the networks of a sweep are sampled: for its scores, its sample grids, and by default afterwards."""

    sampler: str | None = None
    """Of methods that have several; None: the method's own."""
    grid: str | None = None
    """Time grid of the steps, such as `shifted:3`; None: the method's own."""
    times: tuple[float, ...] | None = None
    """Times at which the steps end, for sampling in one step more than there are times; None: those of the grid."""
    guidance: float | None = None
    """Guidance scale at sampling, of methods that have it or are trained on a range; None: the method's own."""
    interval: tuple[float, float] | None = None
    """Guidance interval at sampling, of networks trained on intervals that vary; None: the middle of each end's range."""
    steps: Steps = 1
    """Steps of `generate`, `evaluate` and the registered model's `predict` where nothing else names them."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a method that these replace."""
        given = {
            "sampler": self.sampler,
            "sampling_grid": self.grid,
            "sampling_times": self.times,
            "sampling_scale": self.guidance,
            "sampling_interval": self.interval,
        }
        return {name: value for name, value in given.items() if value is not None}


def with_sampling(objective: Objective, settings: Mapping[str, Any]) -> Objective:
    """The same method, sampled with other settings. Raises UserError for a setting it does not have, or a value it refuses."""
    known = marked(objective, SAMPLING)
    for name in settings:
        if name not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has one way of sampling"
            raise UserError(f"{objective.method} has no sampling setting `{name}`: {has}.")
    if not settings:
        return objective
    if "sampling_grid" in settings and "sampling_times" in known:
        # Times of the training would go before the grid.
        settings = {"sampling_times": None, **settings}
    try:
        kind = TypeAdapter(type(objective))
        return kind.validate_python({**dataclasses.asdict(objective), **settings})  # type: ignore[call-overload]
    except ValidationError as error:
        first = error.errors()[0]
        message = re.sub(r"^[A-Z]\w*\.(?=\w+ is )", "", first["msg"].removeprefix("Value error, "))
        name = ".".join(str(part) for part in first["loc"])
        setting = f"`{name}` is {first['input']!r}: " if name else ""
        raise UserError(f"{objective.method}: {setting}{message[:1].lower()}{message[1:]}.") from None
