"""Rules of `search.stop`: values of a metric at which a trial that diverges is ended."""

from __future__ import annotations

import math
from collections.abc import Mapping

from soflow_platform.config.search import StopRule


def broken_rule(rules: Mapping[str, StopRule], values: Mapping[str, float]) -> str | None:
    """A sentence on the first rule that one of the values breaks; None where none does."""
    for name, rule in rules.items():
        value = values.get(name)
        if value is None:
            continue
        if not math.isfinite(value):
            if rule == "nan":
                return f"{name} is {value}"
            continue
        if rule == "nan":
            continue
        if rule.above is not None and value > rule.above:
            return f"{name} is {value:.4g}, above {rule.above:g}"
        if rule.below is not None and value < rule.below:
            return f"{name} is {value:.4g}, below {rule.below:g}"
    return None
