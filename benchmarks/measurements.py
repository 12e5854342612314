"""Measurements with their noise: a JSON file, a Markdown table, and what moved between two files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

LEAST_NOISE = 0.02
"""Of a value: differences below it are never said to be more than noise."""


@dataclass(frozen=True)
class Measurement:
    """One number of a benchmark."""

    section: str
    name: str
    value: float
    unit: str = ""
    better: str = ""
    """`lower` or `higher`; empty where neither is."""
    noise: float = 0.0
    """Half the range of its repetitions over the value; 0 where it was measured once or is exact."""

    @property
    def key(self) -> str:
        return f"{self.section}: {self.name}"


@dataclass
class Results:
    """The measurements of one run on one machine."""

    name: str
    machine: dict[str, str]
    measurements: list[Measurement] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """What was not measured -> why."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each section."""
    date: str = ""
    """YYYY-MM-DD."""
    load: float = 0.0
    """Processes that wanted a core as it began: above 0 other programs were at work."""
    others: dict[str, float] = field(default_factory=dict)
    """Share of the processors that other programs took just before or after each section, the larger of the two."""

    def add(
        self, section: str, name: str, values: float | Sequence[float], unit: str = "", better: str = ""
    ) -> float:
        """Take a number, or the median of several with their noise. Returns it."""
        several = [values] if isinstance(values, int | float) else list(values)
        value = statistics.median(several)
        noise = (max(several) - min(several)) / 2 / abs(value) if value else 0.0
        self.measurements.append(Measurement(section, name, value, unit, better, noise))
        return value

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**content, "measurements": [Measurement(**each) for each in content["measurements"]]})

    def markdown(self) -> str:
        """A table for each section."""
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        parts = [f"# {self.name}", machine]
        for section in dict.fromkeys(each.section for each in self.measurements):
            rows = [
                f"| {each.name} | {each.value:.4g} {each.unit} | {100 * each.noise:.1f} % |"
                for each in self.measurements
                if each.section == section
            ]
            took = f" ({self.seconds[section]:.0f} s)" if section in self.seconds else ""
            parts.append(
                "\n".join([f"## {section}{took}", "", "| what | value | noise |", "|---|---|---|", *rows])
            )
        if self.skipped:
            rows = [f"| {what} | {why} |" for what, why in self.skipped.items()]
            parts.append("\n".join(["## Not measured", "", "| what | why |", "|---|---|", *rows]))
        return "\n\n".join(parts) + "\n"


def moved(before: Results, now: Results) -> list[str]:
    """A line for each number that differs between two runs by more than the noise of both, and for those that one lacks."""
    old = {each.key: each for each in before.measurements}
    lines = []
    for each in now.measurements:
        known = old.pop(each.key, None)
        if known is None:
            lines.append(f"{each.key}: {each.value:.4g} {each.unit} (new)")
            continue
        change = each.value - known.value
        noise = max(known.noise + each.noise, LEAST_NOISE) * abs(known.value)
        if abs(change) > noise:
            share = f" ({100 * change / known.value:+.1f} %)" if known.value else ""
            lines.append(
                f"{each.key}: {known.value:.4g} -> {each.value:.4g} {each.unit}{share}{_verdict(each, change)}"
            )
    lines += [f"{key}: no longer measured" for key in old]
    return lines


def _verdict(measurement: Measurement, change: float) -> str:
    if not measurement.better:
        return ""
    return ", better" if (change < 0) == (measurement.better == "lower") else ", WORSE"
