"""Names of the runs of trials in MLflow: what varies, in the papers' symbols, and the trial's number, as in `p=0.5 r0=0.1 #00`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SYMBOLS = {
    "objective.flow_matching_share": "λ",
    "objective.weight_power": "p",
    "objective.weight_eps": "eps",
    "objective.guidance.scale": "w",
    "objective.guidance.mix": "m",
    "objective.guidance.drop": "drop",
    "objective.guidance.decay_from": "τ",
    "objective.schedule.kind": "r",
    "objective.schedule.initial": "r0",
    "objective.schedule.final": "rK",
    "objective.times.velocity.mean": "μv",
    "objective.times.velocity.std": "σv",
    "objective.times.start.mean": "μt",
    "objective.times.start.std": "σt",
    "objective.times.end.mean": "μs",
    "objective.times.end.std": "σs",
}
"""Settings -> their symbols in the papers. Others are called by the last part of their names."""
LONGEST = 40
"""Characters of a name: what MLflow's table of runs shows of it."""


def run_name(number: int, settings: Mapping[str, Any], label: str | None = None) -> str:
    """The name of the run of a trial; settings that do not fit any more are left out, and `...` stands for them.

    `label` is a name of its own, such as `paper`, which stands in the place of settings.
    """
    end = f"#{number:02d}"
    if label:
        return f"{label[: LONGEST - len(end) - 1]} {end}"
    name = ""
    for place, (key, value) in enumerate(settings.items(), 1):
        longer = f"{name}{_setting(key, value)} "
        last = place == len(settings)
        if len(longer) + len(end) + (0 if last else len("... ")) > LONGEST:
            return f"{name}... {end}"
        name = longer
    return f"{name}{end}"


def _setting(key: str, value: Any) -> str:
    """`p=0.5`; a whole section is named by its method (where that is given for it, too), or by the settings in it."""
    if isinstance(value, Mapping):
        return str(value.get("method") or " ".join(_setting(f"{key}.{name}", v) for name, v in value.items()))
    if key in ("objective", "network"):
        return str(value)
    if key == "budget":
        return f"equal {value}"
    number = isinstance(value, float)
    return f"{SYMBOLS.get(key, key.rsplit('.', 1)[-1])}={f'{value:.3g}' if number else value}"
