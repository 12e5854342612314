"""All versions of all registered models, as a table of plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from soflow_platform.registry.tags import (
    DECISION_PREFIX,
    IMAGES_TAG,
    METHOD_TAG,
    NETWORK_TAG,
    PARAMETERS_TAG,
)
from soflow_platform.tracking.store import SWEEP_TAG, TRIAL_TAG, TrackingStore


@dataclass(frozen=True)
class ListedVersion:
    """A registered version with what its tags say; None where they do not."""

    model: str
    version: str
    aliases: tuple[str, ...]
    metric: str | None
    """Metric by which it was chosen."""
    score: float | None
    """Value of that metric, at the end of its training."""
    method: str | None
    network: str | None
    parameters: int | None
    images: int | None
    """Training images seen."""
    sweep: str | None
    trial: str | None
    decision: str | None
    """The newest decision of the gate about it."""


def list_versions(store: TrackingStore, model: str | None = None) -> list[ListedVersion]:
    """The versions of a model, or of all, newest first within a model."""
    client = store.client
    if model and name_filter(model) is None:
        return []
    listed: list[ListedVersion] = []
    for registered in _all(client.search_registered_models, name_filter(model) if model else None):
        aliases = {alias: str(version) for alias, version in registered.aliases.items()}
        wanted = name_filter(registered.name)
        versions = [] if wanted is None else _all(client.search_model_versions, wanted)
        versions.sort(key=lambda each: -int(each.version))
        listed += [_listed(version, aliases) for version in versions]
    return listed


def name_filter(name: str) -> str | None:
    """MLflow's filter of the models, or of the versions of the model, of this name; None for a name that no filter can hold."""
    quote = next((each for each in "'\"" if each not in name), None)
    return None if quote is None or "\\" in name else f"name = {quote}{name}{quote}"


def _all(search: Any, wanted: str | None) -> list[Any]:
    """All pages of a search."""
    found: list[Any] = []
    token = None
    while True:
        page = search(filter_string=wanted, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _listed(version: Any, aliases: dict[str, str]) -> ListedVersion:
    tags = version.tags
    metric = tags.get("metric")
    number = str(version.version)
    return ListedVersion(
        model=version.name,
        version=number,
        aliases=tuple(sorted(alias for alias, held in aliases.items() if held == number)),
        metric=metric,
        score=_number(tags.get(metric or "")),
        method=tags.get(METHOD_TAG),
        network=tags.get(NETWORK_TAG),
        parameters=whole_number(tags.get(PARAMETERS_TAG)),
        images=whole_number(tags.get(IMAGES_TAG)),
        sweep=tags.get(SWEEP_TAG),
        trial=tags.get(TRIAL_TAG),
        decision=tags.get(f"{DECISION_PREFIX}decision"),
    )


def _number(text: str | None) -> float | None:
    """A finite number in a tag; None for anything else."""
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def whole_number(text: str | None) -> int | None:
    """A whole number in a tag; None for anything else."""
    return int(text) if text and text.isdecimal() else None
