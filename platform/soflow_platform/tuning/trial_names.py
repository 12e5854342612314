"""What trials are named by: the settings that vary, and of a whole section that varies what sets it apart from its like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from soflow_core.networks import NETWORKS
from soflow_core.objectives import OBJECTIVES
from soflow_core.registration import Registry
from soflow_core.settings import to_dict
from soflow_platform.config.experiment import flatten
from soflow_platform.config.search import SearchConfig

SECTIONS: dict[str, Registry[Any]] = {"objective": OBJECTIVES, "network": NETWORKS}
"""Sections that a registered part describes."""


def named_settings(settings: Mapping[str, Any], search: SearchConfig) -> dict[str, Any]:
    """The settings of a point, with the name of its part for a whole section.

    Where other points of the search have a section of the same name, the settings in which they differ follow, defaults included:
    `{"objective": "meanflow", "objective.difference": 0.05}`.
    """
    named: dict[str, Any] = {}
    for key, value in settings.items():
        name = _part(key, value)
        if name is None:
            named[key] = value
            continue
        named[key] = name
        others = [_flat(key, each) for each in _values(search, key) if _part(key, each) == name]
        for setting, own in _flat(key, value).items():
            if own is not None and any(other.get(setting) != own for other in others):
                named[f"{key}.{setting}"] = own
    return named


def trial_label(settings: Mapping[str, Any], search: SearchConfig) -> str:
    """`weight_power=1-lr=0.001`, `meanflow-difference=0.05`: what the name of a trial says of the settings of its point."""
    return "-".join(_label(key, value) for key, value in named_settings(settings, search).items())


def _label(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(_label(name, each) for name, each in value.items())
    if key in SECTIONS:
        return str(value)
    return f"{key.rsplit('.', 1)[-1]}={f'{value:.4g}' if isinstance(value, float) else value}"


def _part(key: str, value: Any) -> str | None:
    """The name of the part that a whole section describes; None for other settings."""
    if key not in SECTIONS or not isinstance(value, dict):
        return None
    return value.get(SECTIONS[key].field)


def _values(search: SearchConfig, key: str) -> Iterator[Any]:
    """The values that points of the search have at a path."""
    dimension = search.dimensions().get(key)
    yield from (dimension.values if dimension is not None else None) or []
    yield from (point[key] for point in search.first if key in point)


def _flat(key: str, section: dict[str, Any]) -> dict[str, Any]:
    """The settings of a section by their paths, with the defaults of its part where it is complete."""
    try:
        return flatten(to_dict(SECTIONS[key].read(section)))
    except (ValueError, TypeError):
        # A network lacks what the data decide; settings that are refused are named when the trial is made.
        return flatten(section)
