"""Settings dataclasses: checks of their values, and conversion to plain dictionaries and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

SettingsT = TypeVar("SettingsT")


def check_choices(settings: Any) -> None:
    """Raises ValueError where a field that takes one of several names has another value."""
    kind = type(settings)
    for name, known in _choices(kind).items():
        value = getattr(settings, name)
        if value not in known:
            raise ValueError(
                f"{kind.__name__}.{name} is {value!r}; it is one of {', '.join(map(repr, known))}"
            )


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
    """Nested dictionaries -> the dataclass `kind`. Raises ValueError for a key that it does not have."""
    assert dataclasses.is_dataclass(kind)
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(value, Mapping):
        # The hint may be a dataclass or None.
        for kind in (hint, *get_args(hint)):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                return from_dict(kind, value)
    return tuple(value) if isinstance(value, list) else value


def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    """Literal fields of a dataclass, with their values."""
    hints = get_type_hints(kind)
    return {
        field.name: get_args(hints[field.name])
        for field in dataclasses.fields(kind)
        if get_origin(hints[field.name]) is Literal
    }
