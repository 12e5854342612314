"""Seconds from the command to the first training step, between trials, and of the whole main job, by the times in MLflow.

    python benchmarks/startup.py [--rounds 3] [--source CHECKOUT] [--set section.key=value ...]

Runs `soflowctl run sweeps/digits.yaml` twice in a new project folder for each round: the first time whole, with data and reference
statistics to prepare; then another sweep of one short trial, for which they are there. A first step is the time of the first point of
a trial's loss curve, an end that of its run. The share of training is the time between the two, over all trials, of what as many
trials at once could have had. `--source` runs another checkout of this repository, so that two can be compared on one machine. Exit
code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.tuning.record import all_records

ROOT = Path(__file__).parents[1]
SHORT = ("search.space={}", "training.steps=20", "evaluation.every=20", "seed=1")
COMMANDS = {
    "--help": 0.3,
    "runs": 0.5,
    "status": 0.5,
    "validate sweeps/digits.yaml": 1.5,
    "run sweeps/digits.yaml --dry-run": 1.5,
}
"""Commands that start nothing, and the seconds that each may take."""
FIRST_STEP, FIRST_STEP_EVER, BETWEEN, SHARE = 12.0, 20.0, 2.0, 0.85


@dataclass(frozen=True)
class Span:
    """When a trial made its first step and when it ended, in seconds since the command."""

    first: float
    end: float


@dataclass(frozen=True)
class SweepTimes:
    """What one command took."""

    whole: float
    trials: list[Span]
    concurrent: int

    @property
    def first_step(self) -> float:
        return min(trial.first for trial in self.trials)

    @property
    def between(self) -> list[float]:
        """From the end of a trial to the first step of the one that took its place."""
        ends = sorted(trial.end for trial in self.trials)
        later = sorted(trial.first for trial in self.trials)[self.concurrent :]
        return [first - end for first, end in zip(later, ends, strict=False)]

    @property
    def share(self) -> float:
        return sum(trial.end - trial.first for trial in self.trials) / (self.concurrent * self.whole)


def soflowctl(source: Path, *arguments: str) -> float:
    """Run a command of a checkout; returns its seconds. Raises SystemExit where it fails."""
    paths = [str(source), str(source / "pipelines"), str(source / "platform")]
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "soflow_platform.cli.main", *arguments],
        cwd=source,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"soflowctl {' '.join(arguments)} failed: {done.stderr}")
    return time.time() - started


def run_sweep(source: Path, project: ProjectFolder, settings: tuple[str, ...]) -> SweepTimes:
    """Run the digits sweep with these settings, and read its times."""
    flags = [part for setting in settings for part in ("--set", setting)]
    started = time.time()
    whole = soflowctl(source, "run", "sweeps/digits.yaml", "--storage", str(project.root), *flags)
    record = all_records(project)[0]
    tracking = Tracking(TrackingStore(project.tracking_uri), record.experiment_id or "")
    spans = []
    for run in tracking.children(record.run or ""):
        points = tracking.client.get_metric_history(run.info.run_id, "train/loss")
        first = min(point.timestamp for point in points)
        spans.append(Span(first / 1000 - started, run.info.end_time / 1000 - started))
    concurrent = min(len(spans), os.cpu_count() or 1)
    return SweepTimes(whole, spans, concurrent)


def report(name: str, values: list[float], bar: float | None = None, at_least: bool = False) -> bool:
    """Print a row: the median, every value, the bar and whether it holds."""
    middle = statistics.median(values)
    held = bar is None or (middle >= bar if at_least else middle <= bar)
    limit = "-" if bar is None else f"{'at least' if at_least else 'at most'} {bar:g}"
    each = " ".join(f"{value:.2f}" for value in values)
    print(
        f"| {name} | {middle:.2f} | {each} | {limit} | {'holds' if held else 'MISSED'} |",
        flush=True,
    )
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--source", type=Path, default=ROOT, help="the checkout that is measured")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="of the main job")
    options = parser.parse_args()
    whole: list[SweepTimes] = []
    short: list[SweepTimes] = []
    commands: dict[str, list[float]] = {line: [] for line in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            project = ProjectFolder(Path(folder) / str(number))
            whole.append(run_sweep(options.source, project, tuple(options.settings)))
            short.append(run_sweep(options.source, project, (*options.settings, *SHORT)))
            for line, taken in commands.items():
                place = ("--storage", str(project.root)) if line in ("runs", "status") else ()
                taken.append(soflowctl(options.source, *line.split(), *place))
    print(
        f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores\n| what | median | each | bar | |\n|---|---|---|---|---|"
    )
    held = [
        report("command to first step, s", [times.first_step for times in short], FIRST_STEP),
        report("the same in a new project folder, s", [times.first_step for times in whole], FIRST_STEP_EVER),
        report(
            "end of a trial to the next one's first step, s", [b for t in whole for b in t.between], BETWEEN
        ),
        report("main job, s", [times.whole for times in whole]),
        report("share of it that trials train", [times.share for times in whole], SHARE, at_least=True),
        *(report(f"`{line}`, s", taken, COMMANDS[line]) for line, taken in commands.items()),
    ]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
