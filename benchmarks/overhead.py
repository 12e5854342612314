"""Seconds of a training step under the platform against the same step in a bare loop, in one run.

    python benchmarks/overhead.py [--rounds 2] [--batch 64] [--threads N]

Both train S/4 on the digits: same batches, same draws, same TrainStep, as many threads, no niceness. The
platform's step is what `soflowctl run` takes: a trial in a process of Ray Tune, curves to MLflow on SQLite
every 50 steps, a checkpoint every 100, log and status files. The bare loop has a loader, draws and the step,
and writes nothing. The two run in turn, in processes of their own: bare, platform, platform, bare. What
counts is the time from step 50 to step 150, in which one checkpoint is made, by the times of the points of
the loss curve; starting, evaluating and ending are left out. Both curves must be equal, which shows that
both did the same work. Bar: the platform's step takes at most 1.03 times the bare one where `--threads` leaves
a core free, 1.08 where it leaves none; exit code 1 where it is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from soflow_core.networks import DiT
from soflow_core.objectives import Batch
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.storage.files import read_json
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.presets import sweeps_folder
from soflow_platform.config.validation import read_experiment
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore
from soflow_platform.training.dataset import open_data
from soflow_platform.training.model import network_config
from soflow_platform.training.step_noise import step_generator
from soflow_platform.training.trial_log import LOG
from soflow_platform.training.trial_status import STATUS
from soflow_platform.tuning.record import all_records

BAR_FREE, BAR_TAKEN = 1.03, 1.08
"""Most that a step under the platform may take of the bare one, with a core free beside the threads and with none."""
LOG_EVERY = 50
CHECKPOINT_EVERY = 100
LAST_STEPS = 5
"""After the last point that counts; the run's end is evaluated and saved."""


@dataclass(frozen=True)
class Curve:
    """Moments (seconds) and losses of the logged steps of one training, and how it ran."""

    moments: dict[int, float]
    losses: dict[int, float]
    niceness: int
    notes: tuple[str, ...] = ()

    def seconds(self, first: int, last: int) -> float:
        """Of one step, between two logged ones."""
        return (self.moments[last] - self.moments[first]) / (last - first)


def overrides(options: argparse.Namespace) -> list[str]:
    """What differs from sweeps/digits.yaml."""
    steps = last_point(options) + LAST_STEPS
    training = f"steps: {steps}, batch: {options.batch}, ema: [0.999], log_every: {LOG_EVERY}"
    return [
        f"network={{size: {options.size}}}",
        f"training={{{training}, checkpoint_every: {CHECKPOINT_EVERY}, precision: float32}}",
        f"evaluation={{every: {steps}, samples: 32, nfe: [1], features: pooled, grid: 2}}",
        "search={metric: eval/fd_nfe1, space: {}}",
        f"resources={{workers: 1, cpus_per_worker: {options.threads}}}",
        "registry.enabled=false",
    ]


def last_point(options: argparse.Namespace) -> int:
    return LOG_EVERY + options.periods * CHECKPOINT_EVERY


def read(options: argparse.Namespace) -> Experiment:
    return read_experiment(sweeps_folder() / "digits.yaml", tuple(overrides(options)))[0]


def train_bare(options: argparse.Namespace, storage: ProjectFolder) -> None:
    """The bare loop; prints its curve as JSON."""
    torch.set_num_threads(options.threads)
    experiment = read(options)
    location, info = open_data(experiment, storage)
    training, objective = experiment.training, experiment.objective
    loader = ShardLoader(location, batch_size=training.batch, seed=experiment.seed)
    torch.manual_seed(experiment.seed)
    train_step = TrainStep(
        DiT(network_config(experiment, info)),
        objective,
        TrainStepConfig(
            total_steps=training.steps,
            optimizer=experiment.optimizer,
            ema_decays=training.ema,
            precision="float32",
        ),
    )
    moments, losses = {}, {}
    for step in range(1, last_point(options) + 1):
        loaded = next(loader)
        draws = objective.draw(
            step_generator(experiment.seed, step), training.batch, tuple(info.shape), conditional=True
        )
        record = train_step(Batch(loaded.x0, loaded.labels), draws)
        if step % LOG_EVERY == 0:
            moments[step], losses[step] = time.time(), record.loss
    print(json.dumps({"moments": moments, "losses": losses, "niceness": psutil.Process().nice()}))


def run_bare(options: argparse.Namespace, storage: ProjectFolder) -> Curve:
    command = [sys.executable, __file__, "--bare", str(storage.root), *settings(options)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the bare loop failed:\n{done.stderr}")
    curve: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Curve(_by_step(curve["moments"]), _by_step(curve["losses"]), curve["niceness"])


def run_platform(options: argparse.Namespace, storage: ProjectFolder) -> Curve:
    """One sweep of one trial, as a user starts it; its curve is read from MLflow."""
    changes = [word for override in overrides(options) for word in ("--set", override)]
    command = [sys.executable, "-m", "soflow_platform.cli.main", "run", "digits"]
    with subprocess.Popen(
        [*command, *changes, "--storage", str(storage.root)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as sweep:
        niceness = _worker_niceness(sweep, storage)
        printed, _ = sweep.communicate()
    if sweep.returncode:
        raise SystemExit(f"the sweep failed:\n{printed}")
    record = all_records(storage)[0]
    client = TrackingStore(record.tracking_uri or "").client
    (run,) = client.search_runs(
        [record.experiment_id or ""], f"tags.`mlflow.parentRunId` = '{record.run}'", max_results=2
    )
    points = {p.step: p for p in client.get_metric_history(run.info.run_id, "train/loss")}
    log = storage.trial(record.id, record.trials[0].name) / LOG
    saved = tuple(line for line in log.read_text().splitlines() if "checkpoint" in line)
    logged = {step: p for step, p in points.items() if step % LOG_EVERY == 0}
    return Curve(
        {step: p.timestamp / 1000 for step, p in logged.items()},
        {step: p.value for step, p in logged.items()},
        niceness,
        saved,
    )


def _worker_niceness(sweep: subprocess.Popen[str], storage: ProjectFolder) -> int:
    """Of the process that trains; waits until it says that it runs."""
    while sweep.poll() is None:
        for path in storage.sweeps.glob(f"*/trials/*/{STATUS}"):
            status = read_json(path) or {}
            if status.get("state") == "running":
                return psutil.Process(status["pid"]).nice()
        time.sleep(0.5)
    return 0


def _by_step(values: dict[str, float]) -> dict[int, float]:
    return {int(step): value for step, value in values.items()}


def settings(options: argparse.Namespace) -> list[str]:
    chosen = {"threads": options.threads, "batch": options.batch, "periods": options.periods}
    return [word for key, value in chosen.items() for word in (f"--{key}", str(value))] + [
        "--size",
        options.size,
    ]


def environment() -> dict[str, str]:
    """Ray starts workers at niceness 15 by default, which would give other processes the cores first."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "SOFLOW_STORAGE")}
    return {**inherited, "RAY_worker_niceness": "0"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2, help="of each; the order turns in every round")
    parser.add_argument("--periods", type=int, default=1, help="checkpoints in the time that counts")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", default="S/4")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--bare", metavar="STORAGE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        train_bare(options, ProjectFolder(Path(options.bare)))
        return 0
    return compare(options)


def compare(options: argparse.Namespace) -> int:
    first, last = LOG_EVERY, last_point(options)
    print(f"{options.size}, batch {options.batch}, {options.threads} thread(s), steps {first} to {last}")
    print("| loop | s/step | by 50 steps | niceness |\n|---|---|---|---|")
    taken: dict[str, list[float]] = {"bare": [], "platform": []}
    curves: list[Curve] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            order = ["bare", "platform"] if number % 2 == 0 else ["platform", "bare"]
            for kind in order:
                storage = ProjectFolder(Path(folder) / f"{number}-{kind}")
                storage.root.mkdir()
                curve = (run_bare if kind == "bare" else run_platform)(options, storage)
                curves.append(curve)
                taken[kind].append(curve.seconds(first, last))
                parts = [curve.seconds(p, p + LOG_EVERY) for p in range(first, last, LOG_EVERY)]
                each = " ".join(f"{part:.4f}" for part in parts)
                print(f"| {kind} | {taken[kind][-1]:.4f} | {each} | {curve.niceness} |", flush=True)
                for note in curve.notes:
                    print(f"    {note}")
    if any(
        curve.losses != {k: v for k, v in curves[0].losses.items() if k in curve.losses} for curve in curves
    ):
        raise SystemExit("the losses differ: the two loops did not do the same work.")
    if len({curve.niceness for curve in curves}) > 1:
        print("the niceness differs: the ratio is not of like with like.")
    ratio = sum(taken["platform"]) / sum(taken["bare"])
    bar = BAR_FREE if options.threads < (os.cpu_count() or 1) else BAR_TAKEN
    held = ratio <= bar
    print(f"platform / bare = {ratio:.4f}, bar {bar}: {'holds' if held else 'MISSED'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
