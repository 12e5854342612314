"""Every setting of a sweep file that is a number, read from the schema, and an override that sets it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Union

from pydantic import BaseModel

from soflow_core.objectives import OBJECTIVES
from soflow_core.settings import SECTIONS
from soflow_platform.config.experiment import Experiment

ELEMENT = "[]"
"""Stands in a path for an element of a list."""
BESIDE = {
    "comparison": "steps: [1]",
    "registry.gate.guards": "metric: precision",
}
"""What else an element of a list of sections needs."""


@dataclass(frozen=True)
class NumericSetting:
    """A number of a sweep file. `method` is a training method that has it."""

    method: str
    path: tuple[str, ...]
    kind: type

    def __str__(self) -> str:
        return f"{self.method}:{'.'.join(self.path)}"

    @property
    def key(self) -> str:
        """Its own name."""
        return next(part for part in reversed(self.path) if part != ELEMENT)

    def override(self, value: str) -> str:
        """`section.key=...` that sets it to a value written as YAML."""
        if ELEMENT not in self.path:
            return f"{'.'.join(self.path)}={value}"
        first = self.path.index(ELEMENT)
        place, inside = ".".join(self.path[:first]), self.path[first + 1 :]
        for part in reversed(inside):
            value = f"[{value}]" if part == ELEMENT else f"{part}: {value}"
        if inside and place in BESIDE and not BESIDE[place].startswith(f"{inside[0]}:"):
            value = f"{BESIDE[place]}, {value}"
        return f"{place}=[{f'{{{value}}}' if inside else value}{', 0.9' if place.endswith('betas') else ''}]"

    def value(self, experiment: Experiment) -> Any:
        """What an experiment has of it."""
        found: Any = experiment
        for part in self.path:
            found = found[0] if part == ELEMENT else getattr(found, part)
        return found


def numeric_settings() -> list[NumericSetting]:
    """All of them, those of the objective for each training method."""
    found = [
        NumericSetting("soflow", *leaf)
        for name, field in Experiment.model_fields.items()
        if name != "objective"
        for leaf in _leaves(field.annotation, (name,))
    ]
    for method, objective in OBJECTIVES.items():
        found += [NumericSetting(method, *leaf) for leaf in _leaves(objective, ("objective",))]
    return list(dict.fromkeys(found))


def _leaves(annotation: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], type]]:
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (int, float):
        yield path, annotation
    elif origin is Annotated:
        yield from _leaves(members[0], path)
    elif origin in (Union, types.UnionType):
        for member in members:
            yield from _leaves(member, path)
    elif origin in (tuple, list):
        for member in set(members) - {Ellipsis}:
            yield from _leaves(member, (*path, ELEMENT))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from _leaves(field.annotation, (*path, name))
    elif annotation in SECTIONS:
        yield from _leaves(SECTIONS[annotation][SECTIONS[annotation].default], path)
    elif isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        for field in dataclasses.fields(annotation):
            yield from _leaves(hints[field.name], (*path, field.name))
