"""Seconds from the command to the first training step, between trials, and of the whole main job, by the times in MLflow.

    python benchmarks/startup.py [--rounds 3] [--source CHECKOUT] [--set section.key=value ...]

Runs `soflowctl run sweeps/digits.yaml` twice in a new project folder for each round: the first time whole, with data and reference
statistics to prepare; then another sweep of one short trial, for which they are there. A first step is the time of the first point of
a trial's loss curve, an end that of its run. The share of training is the time between the two, over all trials, of what as many
trials at once could have had. Memory is the largest sum of the proportional shares (PSS, which counts a shared page once) of the
command and all processes that it started, once a second during the main job. `--source` runs another checkout of this repository,
so that two can be compared on one machine. Exit code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

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
FIRST_STEP, FIRST_STEP_EVER, BETWEEN, SHARE, MEMORY = 12.0, 20.0, 2.0, 0.85, 8.0


@dataclass(frozen=True)
class Span:
    """When a trial made its first step and when it ended, in seconds since the command."""

    first: float
    end: float


@dataclass(frozen=True)
class Memory:
    """GiB of a command with all processes that it started, how many these are, and GiB of the largest one."""

    total: float = 0.0
    processes: int = 0
    largest: float = 0.0


@dataclass(frozen=True)
class SweepTimes:
    """What one command took."""

    whole: float
    trials: list[Span]
    concurrent: int
    memory: Memory

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


def soflowctl(source: Path, *arguments: str) -> tuple[float, Memory]:
    """Run a command of a checkout; returns its seconds and its peak memory. Raises SystemExit where it fails."""
    paths = [str(source), str(source / "pipelines"), str(source / "platform")]
    peak = Memory()
    started = time.time()
    with tempfile.TemporaryFile("w+") as errors:
        command = subprocess.Popen(
            [sys.executable, "-m", "soflow_platform.cli.main", *arguments],
            cwd=source,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        while not ended(command):
            peak = max(peak, memory_of(command.pid), key=lambda memory: memory.total)
        seconds = time.time() - started
        errors.seek(0)
        if command.returncode:
            raise SystemExit(f"soflowctl {' '.join(arguments)} failed: {errors.read()}")
    return seconds, peak


def ended(command: subprocess.Popen[bytes]) -> bool:
    """Whether a process ends within a second."""
    try:
        command.wait(1.0)
    except subprocess.TimeoutExpired:
        return False
    return True


def memory_of(pid: int) -> Memory:
    """Of a process and its descendants, now."""
    shares = []
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                shares.append(one.memory_full_info().pss / 2**30)
    return Memory(sum(shares), len(shares), max(shares, default=0.0))


def run_sweep(source: Path, project: ProjectFolder, settings: tuple[str, ...]) -> SweepTimes:
    """Run the digits sweep with these settings, and read its times."""
    flags = [part for setting in settings for part in ("--set", setting)]
    started = time.time()
    whole, memory = soflowctl(source, "run", "sweeps/digits.yaml", "--storage", str(project.root), *flags)
    record = all_records(project)[0]
    tracking = Tracking(TrackingStore(project.tracking_uri), record.experiment_id or "")
    spans = []
    for run in tracking.children(record.run or ""):
        points = tracking.client.get_metric_history(run.info.run_id, "train/loss")
        first = min(point.timestamp for point in points)
        spans.append(Span(first / 1000 - started, run.info.end_time / 1000 - started))
    concurrent = min(len(spans), os.cpu_count() or 1)
    return SweepTimes(whole, spans, concurrent, memory)


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
                taken.append(soflowctl(options.source, *line.split(), *place)[0])
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
        report("peak memory of the main job, GiB", [times.memory.total for times in whole], MEMORY),
        report("processes at the peak", [times.memory.processes for times in whole]),
        report("memory of the largest process, GiB", [times.memory.largest for times in whole]),
        report("share of it that trials train", [times.share for times in whole], SHARE, at_least=True),
        *(report(f"`{line}`, s", taken, COMMANDS[line]) for line, taken in commands.items()),
    ]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
