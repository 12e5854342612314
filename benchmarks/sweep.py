"""What a trial costs beside its training, in sweeps of 1, 4, 16 and 64 tiny trials.

    python benchmarks/sweep.py [--trials 1 4 16 64] [--steps 100] [--concurrent 2]

Each sweep trains the network of `digits` (0.8 M parameters) for a few steps, one thread a trial, and is a command of its own,
as a user starts it. Training is the time of the steps alone, from the rates in the trials' status files. Printed are: seconds
of the whole command; the share of the time of the cores that trials may use which is training; peak memory of the command and
of all of its processes; and, from the differences between sweeps, the fixed seconds of a command and the seconds of a trial
beside its training: opening its run, its evaluation, its checkpoint, its grids, closing its run.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.trial_status import read_status
from soflow_platform.tuning.record import all_records

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Measured:
    """One sweep."""

    trials: int
    seconds: float
    """Of the whole command."""
    training: float
    """Seconds of the training steps of all trials."""
    driver_mib: float
    """Peak memory of the command's process."""
    all_mib: float
    """Peak memory of all of its processes, each without what it shares."""

    def share(self, concurrent: int) -> float:
        """Of the time of the cores that trials may use."""
        return self.training / (self.seconds * min(concurrent, self.trials))


class MemoryWatch(threading.Thread):
    """Peak memory of a process, and of it with all of its descendants, in MiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self._stopped = threading.Event()
        self.driver = self.all = 0.0

    def run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            try:
                family = [self._process, *self._process.children(recursive=True)]
                used = [_mib(process) for process in family]
            except psutil.NoSuchProcess:
                continue
            self.driver, self.all = max(self.driver, used[0]), max(self.all, sum(used))

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def _mib(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().uss) / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def measure(trials: int, options: argparse.Namespace, folder: Path) -> Measured:
    storage = ProjectFolder(folder / f"trials-{trials}")
    changes = [
        f"training={{steps: {options.steps}, batch: 32, ema: [0.9], log_every: 50, precision: float32}}",
        f"evaluation={{every: {options.steps}, samples: 64, nfe: [1], features: pooled, grid: 2}}",
        f"search={{space: {{}}, seeds: {trials}}}",
        f"resources={{workers: 1, cpus_per_worker: 1, concurrent_trials: {options.concurrent}}}",
        "registry.enabled=false",
    ]
    command = [sys.executable, "-m", "soflow_platform.cli.main", "run", "digits", "--quiet", "--no-check"]
    command += [word for change in changes for word in ("--set", change)]
    begun = time.monotonic()
    with subprocess.Popen(
        [*command, "--storage", str(storage.root)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        watch = MemoryWatch(process.pid)
        watch.start()
        printed, _ = process.communicate()
        watch.stop()
    seconds = time.monotonic() - begun
    if process.returncode:
        raise SystemExit(f"the sweep of {trials} trials failed:\n{printed}")
    return Measured(trials, seconds, training_seconds(storage), watch.driver, watch.all)


def training_seconds(storage: ProjectFolder) -> float:
    """Of the steps of all trials of the only sweep of a project folder."""
    (record,) = all_records(storage)
    total = 0.0
    for trial in record.trials:
        status = read_status(storage.trial(record.id, trial.name))
        if status is None or not status.images or not status.images_per_second:
            raise SystemExit(f"{trial.name} has no rate in its status.")
        total += status.images / status.images_per_second
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--concurrent", type=int, default=2)
    options = parser.parse_args()
    print(f"{'trials':>6} {'seconds':>8} {'training':>9} {'share':>6} {'driver MiB':>11} {'all MiB':>8}")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for trials in options.trials:
            one = measure(trials, options, Path(folder))
            found.append(one)
            print(
                f"{one.trials:6} {one.seconds:8.1f} {one.training:9.1f} {one.share(options.concurrent):6.1%} {one.driver_mib:11.0f} "
                f"{one.all_mib:8.0f}",
                flush=True,
            )
    for fewer, more in itertools.pairwise(found):
        if fewer.trials < options.concurrent:
            continue
        added = more.trials - fewer.trials
        each = (more.seconds - fewer.seconds) * options.concurrent / added
        beside = each - (more.training - fewer.training) / added
        print(
            f"from {fewer.trials} to {more.trials} trials: {each:.2f} s of a core for a trial, {beside:.2f} s of them beside its steps"
        )
    first = found[0]
    print(
        f"fixed: {first.seconds - first.training / min(options.concurrent, first.trials):.1f} s for a sweep of {first.trials}"
    )


if __name__ == "__main__":
    main()
