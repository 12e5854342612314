"""Promotion of a registered version to champion, behind a gate, and its rollback."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from soflow_platform.errors import UserError
from soflow_platform.registry.versions import CHAMPION, _aliased, find_version, parse_model
from soflow_platform.tracking.store import FLAGS_TAG, TrackingStore

PREVIOUS = "soflow.previous_champion"


@dataclass(frozen=True)
class Promotion:
    """A change of champion: from which version, to which, and why it was accepted."""

    model: str
    version: str
    previous: str | None
    reason: str


def promote(store: TrackingStore, model: str, force: str | None = None) -> Promotion:
    """Make a version champion if it is better than the present one on the same metric, or for the reason given.

    Raises UserError where it is not, or where the two cannot be compared.
    """
    version = find_version(store, model)
    name, champion = version.name, _aliased(store, version.name, CHAMPION)
    if champion is not None and champion.version == version.version:
        raise UserError(f"version {version.version} of {name!r} is the champion already.")
    reason = f"forced: {force}" if force else _gate(version, champion)
    client = store.client
    previous = str(champion.version) if champion else None
    client.set_model_version_tag(name, version.version, PREVIOUS, previous or "")
    _record(client, name, version.version, reason)
    client.set_registered_model_alias(name, CHAMPION, version.version)
    return Promotion(name, str(version.version), previous, reason)


def rollback(store: TrackingStore, model: str) -> Promotion:
    """Make the champion before the present one champion again. Raises UserError where there was none."""
    name, _, _ = parse_model(model)
    champion = find_version(store, f"{name}@{CHAMPION}")
    previous = champion.tags.get(PREVIOUS)
    if not previous:
        raise UserError(
            f"version {champion.version} of {name!r} is the first champion: there is none before it."
        )
    client = store.client
    reason = f"rollback from version {champion.version}"
    _record(client, name, previous, reason)
    client.set_registered_model_alias(name, CHAMPION, previous)
    return Promotion(name, previous, str(champion.version), reason)


def _gate(version: Any, champion: Any | None) -> str:
    """Why a version may become champion. Raises UserError where it may not."""
    if champion is None:
        return "first champion"
    metric = version.tags.get("metric")
    # Remarks on the numbers are no settings that the numbers depend on.
    settings = [k for k in version.tags if k.startswith("eval.") and k != FLAGS_TAG]
    facts = [metric, "mode", *settings]
    values = version.tags.get(metric), champion.tags.get(metric)
    differing = [k for k in facts[1:] if version.tags.get(k) != champion.tags.get(k)]
    if metric is None or None in values or differing:
        what = f"they differ in {', '.join(differing)}" if differing else f"both need {metric or 'a metric'}"
        raise UserError(
            f"version {version.version} cannot be compared with champion {champion.version}: {what}; "
            'pass --force "REASON" to promote it all the same.'
        )
    new, old = float(values[0]), float(values[1])
    if not (new < old if version.tags["mode"] == "min" else new > old):
        raise UserError(
            f"version {version.version} has {metric} {new:.4g} and champion {champion.version} has {old:.4g}: it is not "
            'better; pass --force "REASON" to promote it all the same.'
        )
    return f"{metric} {new:.6g} is better than {old:.6g}"


def _record(client: Any, name: str, version: Any, reason: str) -> None:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    client.set_model_version_tag(name, version, "soflow.promoted", f"{when} {reason}")
