"""The trials a search space stands for, each a complete experiment, checked before anything starts."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
from dataclasses import dataclass
from typing import Any

from soflow_platform.config.document import Document, Origin
from soflow_platform.config.experiment import Experiment, validate
from soflow_platform.config.search import Range, SearchConfig
from soflow_platform.errors import UserError


@dataclass(frozen=True)
class Trial:
    """One point of the search. `name` is unique in the sweep and says what varies."""

    index: int
    name: str
    settings: dict[str, Any]
    experiment: Experiment


def trials(document: Document, experiment: Experiment) -> list[Trial]:
    """Every trial of a sweep, in order; the same document always gives the same list.

    Raises UserError where a point of the space is not a valid experiment.
    """
    points = _points(experiment.search, experiment.seed)
    return [_trial(document, index, point) for index, point in enumerate(points)]


def _points(search: SearchConfig, seed: int) -> list[dict[str, Any]]:
    keys = list(search.space)
    if search.algorithm == "grid":
        lists = [values for values in search.space.values() if isinstance(values, list)]
        return [dict(zip(keys, combination, strict=True)) for combination in itertools.product(*lists)]
    generator = random.Random(f"search-{seed}")
    return [
        {key: _draw(values, generator) for key, values in search.space.items()}
        for _ in range(search.trials or 0)
    ]


def _draw(values: list[Any] | Range, generator: random.Random) -> Any:
    if isinstance(values, list):
        return generator.choice(values)
    if values.uniform is not None:
        return generator.uniform(*values.uniform)
    low, high = values.log_uniform or (1.0, 1.0)
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def _trial(document: Document, index: int, point: dict[str, Any]) -> Trial:
    own = Document(copy.deepcopy(document.data), dict(document.origins))
    for key, value in point.items():
        if key.split(".")[0] in ("search", "resources", "tracking", "registry", "name", "data"):
            raise UserError(
                f"{document.origin(('search', 'space', key))}: `{key}` cannot vary between trials; "
                "vary settings of objective, network, optimizer or training."
            )
        where = document.origin(("search", "space", key))
        own.put(tuple(key.split(".")), value, Origin(f"{where.source} (search.space {key})", where.line))
    return Trial(index, _name(index, point), point, validate(own))


def _name(index: int, point: dict[str, Any]) -> str:
    """`trial-02-weight_power=1.0-initial=0.1`, safe as a folder and as a run name."""
    parts = [f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in point.items()]
    return re.sub(r"[^\w.=+-]+", "_", "-".join([f"trial-{index:02d}", *parts]))[:120]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
