"""A sweep at the size and length of another one: its search space on a smaller network, to see cheaply which settings matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from soflow_platform.config.document import Document, KeyPath, Origin
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.validation import validate
from soflow_platform.errors import UserError

TAKEN: tuple[KeyPath, ...] = (
    ("network",),
    ("training", "steps"),
    ("training", "batch"),
    ("training", "accumulate"),
    ("training", "parallel"),
    ("training", "checkpoint_every"),
    ("evaluation", "every"),
    ("resources",),
)
"""What a proxy decides: size, length and machines. Everything else (data, method, space, trials, metric) stays the sweep's."""
SCALED: tuple[KeyPath, ...] = (
    ("search", "asha", "first_rung"),
    ("search", "pbt", "every"),
    ("optimizer", "warmup_steps"),
)
"""Counts of steps that keep their share of the training."""


@dataclass(frozen=True)
class Proxy:
    """What a sweep is at the size of another."""

    document: Document
    left_out: list[str]
    """In which the trials differ from the sweep's own, each a sentence."""


def as_proxy(document: Document, other: Document, name: str) -> Proxy:
    """A sweep's document at the size and length of `other`, which is called `name`.

    Raises UserError where either is no valid sweep, or where nothing of the search space is left.
    """
    sweep, small = validate(document), validate(other)
    origin = Origin(f"--proxy {name}")
    left_out = _differences(sweep, small, name)
    for path in TAKEN:
        _take(document, other, path, origin)
    for path in SCALED:
        _scale(document, path, small.training.steps / sweep.training.steps, origin)
    for point in document.data.get("search", {}).get("first", []):
        for key in [key for key in point if _is_taken(key)]:
            del point[key]
            left_out.append(f"`{key}` of search.first is left out: the proxy decides it")
    for key in filter(_is_taken, sweep.search.space):
        document.drop(("search", "space", key), origin)
        left_out.append(f"`{key}` does not vary: the proxy decides it")
    if sweep.search.space and not document.get(("search", "space")):
        raise UserError(
            f"{origin}: every setting that {sweep.name} varies is one that the proxy decides; run it without."
        )
    document.put(("name",), f"{sweep.name}-at-{small.name}"[:60], origin)
    if sweep.registry.model is not None:
        # The sweep's own model is of another network.
        document.drop(("registry", "model"), origin)
    validate(document)
    return Proxy(document, left_out)


def _take(document: Document, other: Document, path: KeyPath, origin: Origin) -> None:
    """The other's value, or the default where it has none."""
    try:
        value = other.get(path)
    except KeyError:
        try:
            document.drop(path, origin)
        except UserError:
            return
        return
    document.put(path, value, origin)


def _scale(document: Document, path: KeyPath, factor: float, origin: Origin) -> None:
    try:
        steps: Any = document.get(path)
    except KeyError:
        return
    if isinstance(steps, int) and steps > 0:
        document.put(path, max(1, round(steps * factor)), origin)


def _is_taken(key: str) -> bool:
    """Whether the proxy decides a setting that varies."""
    taken = [".".join(map(str, path)) for path in TAKEN]
    return any(key == each or key.startswith(f"{each}.") for each in taken)


def _differences(sweep: Experiment, small: Experiment, name: str) -> list[str]:
    sentences = [
        f"network {small.network.title} for {sweep.network.title}: scores rank settings at that size, and are none of {sweep.name}"
    ]
    if small.training.steps != sweep.training.steps:
        sentences.append(
            f"{small.training.steps:,} steps for {sweep.training.steps:,}: schedules r(k, K) and averages run over the shorter K"
        )
    if small.training.batch != sweep.training.batch:
        sentences.append(f"batches of {small.training.batch:,} for {sweep.training.batch:,}")
    ema = ", ".join(f"{decay:g}" for decay in sweep.training.ema)
    if small.training.ema != sweep.training.ema:
        sentences.append(f"EMA stays {ema}, which {name} has otherwise")
    return sentences
