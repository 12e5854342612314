"""Settings dataclasses to plain dictionaries, for a file's header, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

SettingsT = TypeVar("SettingsT")


def to_dict(settings: Any) -> dict[str, Any]:
    """Nested dataclasses -> nested dictionaries of plain values."""
    return dataclasses.asdict(settings)


def from_dict(kind: type[SettingsT], values: Mapping[str, Any]) -> SettingsT:
    """Nested dictionaries -> the dataclass `kind`; a key that it does not have is refused."""
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
    if isinstance(value, Mapping) and isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    return tuple(value) if isinstance(value, list) else value
