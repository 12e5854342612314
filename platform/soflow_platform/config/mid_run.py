"""Settings that may change in mid-run: numbers of the loss, its time schedules, and the learning rate, which every step reads anew.

Everything else (network, data, batch, seed, averages, how the method is sampled) stays for a whole training.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field

from soflow_core.objectives import Objective
from soflow_core.settings import SAMPLING
from soflow_platform.config.sections import Positive, Section

OPTIMIZER = ("optimizer.lr", "optimizer.final_lr")
"""Settings of the optimizer that may change."""
BUILT_FOR = (
    "uses_jvp",
    "needs_null_label",
    "conditions_on_scale",
    "conditions_on_interval",
    "teacher_decay",
    "needs_true_float32",
    "uses_velocity_head",
    "compares_images",
)
"""What a method asks of network and workers, which are built once."""


class SettingsChange(Section):
    """Settings that have other values from one step on."""

    after: Positive
    """The last step with the values before."""
    settings: Annotated[dict[str, Any], Field(min_length=1)]
    """From a setting's path to its new value."""


def may_change(objective: Objective, key: str) -> bool:
    """Whether a setting, by its path, may change in mid-run of a training by this method."""
    section, _, setting = key.partition(".")
    if section == "objective" and setting:
        return setting not in objective.fixed_settings and _is_number_or_shape(objective, setting.split("."))
    return key in OPTIMIZER


def changeable(objective: Objective) -> str:
    """The settings that may change, for a message: `objective.weight_power, ... or optimizer.lr`."""
    own = [f"objective.{field.name}" for field in dataclasses.fields(objective)]  # type: ignore[arg-type]
    numbers = [key for key in own if may_change(objective, key)]
    return f"{', '.join(numbers) or 'no number of the method'}, its times, guidance and schedule, {' and '.join(OPTIMIZER)}"


def _is_number_or_shape(section: Any, names: list[str]) -> bool:
    """Whether a path leads to a number of a section's settings, or to the shape of its schedule, that acts in training."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    if names[0] not in fields or fields[names[0]].metadata.get(SAMPLING):
        return False
    if names == ["schedule", "kind"]:
        # Where it is a setting of the schedule, and not another class of schedules.
        return any(field.name == "kind" for field in dataclasses.fields(section.schedule))
    if len(names) == 1:
        hint = typing.get_type_hints(type(section))[names[0]]
        return float in (typing.get_args(hint) or (hint,))
    inner = getattr(section, names[0])
    return dataclasses.is_dataclass(inner) and _is_number_or_shape(inner, names[1:])


def with_changes(resolved: Mapping[str, Any], changes: Iterable[SettingsChange]) -> dict[str, Any]:
    """The settings of a sweep file, as nested dictionaries, after these changes and with none to come."""
    settings: dict[str, Any] = copy.deepcopy(dict(resolved))
    settings["training"]["changes"] = []
    for change in changes:
        for key, value in change.settings.items():
            *sections, last = key.split(".")
            at = settings
            for section in sections:
                at = at[section]
            at[last] = value
    return settings


def check_order(changes: Iterable[SettingsChange], steps: int, objective: Objective) -> None:
    """Raises ValueError where changes are out of order, beyond the training, or of settings that stay."""
    before = 0
    for change in changes:
        if change.after <= before:
            raise ValueError(
                f"training.changes has a change after step {change.after} that does not follow the one before it: list them in order"
            )
        if change.after >= steps:
            raise ValueError(
                f"training.changes has a change after step {change.after}, and the training ends at step {steps}: leave it out"
            )
        before = change.after
        for key in change.settings:
            if not may_change(objective, key):
                raise ValueError(
                    f"training.changes has `{key}`, which stays for a whole training: what may change is {changeable(objective)}"
                )


def rebuilt_for(before: Objective, after: Objective) -> str | None:
    """What differs in what two settings of a method ask of network and workers; None where nothing does."""
    return next((name for name in BUILT_FOR if getattr(before, name) != getattr(after, name)), None)
