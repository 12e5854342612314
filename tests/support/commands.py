"""Commands as a user types them, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]

REDUCED = [
    *("--set", "network={patch: 4, hidden: 32, depth: 2, heads: 2}"),
    *("--set", "training={steps: 40, batch: 32, ema: [0.9], log_every: 5}"),
    *("--set", "evaluation={every: 10, samples: 64, nfe: [1, 2], features: digits-classifier, grid: 4}"),
    *("--set", "search.space={objective.weight_power: [0.5, 1.0], objective.schedule.initial: [0.1, 0.5]}"),
]
"""The digits sweep with all of its parts, four trials, and a network that trains in seconds."""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "soflow_platform.cli.main", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
