"""Settings dataclasses: checks of their values, and conversion to plain dictionaries and back."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

SettingsT = TypeVar("SettingsT")

STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}
"""How pydantic reads a settings dataclass: unknown keys and numbers that are not finite are refused at their own key."""

INERT = "inert"
SAMPLING = "sampling"
"""Marks in a field's metadata."""
PARTS = "parts"
"""In a field's metadata: the registry of which a text names a part."""
SHOWN = 80
"""Characters of a value that an error shows."""

SECTIONS: dict[type, Any] = {}
"""Base class of parts that stand as a section of other settings, such as a distribution of times -> its registry."""


def setting(default: Any, *, inert: bool = False, sampling: bool = False) -> Any:
    """A field of a settings dataclass, given by keyword, with marks.

    `inert`: it came after the class was in use, and at its default the class is as it was before: with the default it is no part
    of what identifies a sweep (`identifying`). `sampling`: it acts at sampling alone, so that a trained network can be sampled with
    others.
    """
    marks = {INERT: inert, SAMPLING: sampling}
    return dataclasses.field(default=default, kw_only=True, metadata=marks)


def marked(kind: Any, mark: str) -> tuple[str, ...]:
    """Names of the fields of a settings dataclass that have a mark."""
    return tuple(field.name for field in dataclasses.fields(kind) if field.metadata.get(mark))


def identifying(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings of the dataclass `kind` without the inert ones at their default, in nested dataclasses too."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind) if field.metadata.get(INERT)}
    kept = {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
    for name, hint in _hints(kind).items():
        section = _section(hint, kept[name]) if isinstance(kept.get(name), Mapping) else None
        if section is not None:
            kept[name] = identifying(section, kept[name])
    return kept


def check_values(settings: Any) -> None:
    """Checks each field of a settings dataclass against its type; numbers must be finite, and true is no number.

    Raises ValueError that names the field. Called first in `__post_init__`.
    """
    kind: Any = type(settings)
    hints = _hints(kind)
    for field in dataclasses.fields(kind):
        name, value = field.name, getattr(settings, field.name)
        hint = hints[name]
        if not _fits(value, hint):
            shown = repr(value)
            shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
            known = field.metadata.get(PARTS)
            needed = f"it is one of {', '.join(map(repr, known))}" if known else _needed(hint)
            raise ValueError(f"{kind.__name__}.{name} is {shown}; {needed}")
        if PARTS in field.metadata and value is not None:
            field.metadata[PARTS].check(f"{kind.__name__}.{name}", value)


def check_share(name: str, value: float) -> None:
    """Raises ValueError where a share of the batch is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; a share from 0 to 1 is needed")


def check_drop(name: str, value: float) -> None:
    """Raises ValueError where a probability of dropping a label is not from 0 to below 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; a probability from 0 to below 1 is needed")


def check_weight_eps(value: float) -> None:
    """Raises ValueError where the eps of a loss weight 1 / (mse + eps)^p is not above 0."""
    if value <= 0:
        raise ValueError(f"weight_eps is {value}; it must be above 0, or a loss of 0 has no weight")


def to_dict(settings: Any) -> dict[str, Any]:
    """Nested dataclasses -> nested dictionaries of plain values."""
    return dataclasses.asdict(settings)


def from_dict(kind: type[SettingsT], values: Mapping[str, Any]) -> SettingsT:
    """Nested dictionaries -> the dataclass `kind`.

    Raises ValueError for a key that it does not have, one that is missing, and a value of another type.
    """
    assert dataclasses.is_dataclass(kind)
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    missing = [
        field.name for field in dataclasses.fields(kind) if _is_required(field) and field.name not in values
    ]
    if missing:
        raise ValueError(f"{kind.__name__} lacks {', '.join(missing)}")
    hints = _hints(kind)
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        for kind in _members(hint):
            if kind in SECTIONS:
                return SECTIONS[kind].read(value)
            if dataclasses.is_dataclass(kind):
                return from_dict(kind, value)
    return tuple(value) if isinstance(value, list) else value


def _members(hint: Any) -> list[type]:
    """The classes of a hint, which may be a dataclass or None."""
    return [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)]


def _section(hint: Any, values: Mapping[str, Any]) -> Any:
    """The dataclass of a section with these values; None where a hint has none."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    return next((SECTIONS[kind].class_for(values) for kind in _members(hint) if kind in SECTIONS), None)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    absent = dataclasses.MISSING
    return field.init and field.default is absent and field.default_factory is absent


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, member) for member in members)
    if origin is Literal:
        return any(type(value) is type(known) and value == known for known in members)
    if origin is tuple:
        return isinstance(value, tuple) and _fit_each(value, members)
    if hint in (int, float):
        return (
            not isinstance(value, bool)
            and isinstance(value, Real if hint is float else Integral)
            and _is_finite(value)
        )
    return not isinstance(hint, type) or isinstance(value, hint)


def _fit_each(values: tuple[Any, ...], hints: tuple[Any, ...]) -> bool:
    if len(hints) == 2 and hints[1] is Ellipsis:
        return all(_fits(value, hints[0]) for value in values)
    return len(values) == len(hints) and all(map(_fits, values, hints))


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        # A whole number beyond the range of floats.
        return False


def _needed(hint: Any) -> str:
    """What a field of this type takes, as the end of a sentence."""
    if get_origin(hint) is Literal:
        return f"it is one of {', '.join(map(repr, get_args(hint)))}"
    names = {
        int: "a whole number is needed",
        float: "a finite number is needed",
        bool: "true or false is needed",
    }
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        if len(members) == 1:
            return f"{_needed(members[0])}, or none"
        sections = [cast(type, member) for member in members if dataclasses.is_dataclass(member)]
        if len(sections) == 1:
            section = sections[0]
            return f"{_needed(members[0])}, or {section.__name__}({', '.join(_hints(section))})"
    if get_origin(hint) is tuple and set(get_args(hint)) <= {float, Ellipsis}:
        return "a list of finite numbers is needed"
    return names.get(hint) or f"{getattr(hint, '__name__', hint)} is needed"
