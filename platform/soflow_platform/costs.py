"""What a method costs on this machine: seconds and memory of a training step, seconds of an image.

    python -m soflow_platform.costs QUESTIONS.json ANSWERS.json

A process of its own, with one thread on a CPU, measures all methods in turn, so that their numbers are those of one run. Weights are
as they are initialized: time and memory do not depend on them.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import OBJECTIVES, Batch, Objective
from soflow_core.settings import from_dict, to_dict
from soflow_core.training import OptimizerConfig, TrainStep
from soflow_platform.errors import JobError
from soflow_platform.sampling import generate

POINTS = 6
"""Places of training at which a step is timed: schedules change what it does."""
REPEATS = 2
"""Times that each is timed; the shorter one counts."""
IMAGES = 64
"""Images made at once where sampling is timed."""


@dataclass(frozen=True)
class Trained:
    """A method as it is trained."""

    network: DiTConfig
    objective: Objective
    optimizer: OptimizerConfig
    batch: int
    steps: int
    ema: tuple[float, ...]
    precision: Any


@dataclass(frozen=True)
class Sampled:
    """A method as it is sampled."""

    network: DiTConfig
    objective: Objective
    steps: int


@dataclass(frozen=True)
class Costs:
    """Measured on one machine, in one run."""

    device: str
    threads: int
    step_seconds: list[float]
    """Of each method that was asked about: a training step, on average over its schedule."""
    peak_bytes: list[float]
    """Of each: all tensors that live at once, at most, weights, optimizer and EMAs among them."""
    image_seconds: list[float] = field(default_factory=list)
    """Of each way of sampling: one image of a batch of 64."""


def measure_costs(trained: Sequence[Trained], sampled: Sequence[Sampled]) -> Costs:
    """Measure in a process of its own. Raises JobError where it fails."""
    questions = {
        "trained": [{**vars(one), **_networks(one)} for one in trained],
        "sampled": [{**vars(one), **_networks(one)} for one in sampled],
    }
    for one in questions["trained"]:
        one["optimizer"] = to_dict(one["optimizer"])
    with tempfile.TemporaryDirectory(prefix="soflow-costs-") as folder:
        asked, answered = Path(folder) / "questions.json", Path(folder) / "answers.json"
        asked.write_text(json.dumps(questions))
        command = [sys.executable, "-m", "soflow_platform.costs", str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no word of why"]
            raise JobError(f"the costs could not be measured: {lines[-1]}")
        return Costs(**json.loads(answered.read_text()))


def _networks(one: Trained | Sampled) -> dict[str, Any]:
    return {"network": to_dict(one.network), "objective": to_dict(one.objective)}


def _read(question: dict[str, Any]) -> dict[str, Any]:
    """A question with its settings as they were."""
    objective = question["objective"]
    read = {
        "network": from_dict(DiTConfig, question["network"]),
        "objective": from_dict(OBJECTIVES[objective["method"]], objective),
    }
    if "optimizer" in question:
        read["optimizer"] = from_dict(OptimizerConfig, question["optimizer"])
        read["ema"] = tuple(question["ema"])
    return {**question, **read}


class TimedTraining:
    """One method's training step, on data that do not matter."""

    def __init__(self, one: Trained, device: torch.device) -> None:
        torch.manual_seed(0)
        network = one.network
        self.step = TrainStep(
            DiT(network).to(device),
            one.objective,
            one.optimizer,
            one.steps,
            ema_decays=one.ema,
            precision=one.precision,
        )
        self.one, self.device = one, device
        self.shape = (network.channels, network.height, network.width)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, point: int) -> float:
        """Seconds of a step at this place of the schedule, out of POINTS."""
        one, classes = self.one, self.one.network.classes
        x0 = torch.randn(one.batch, *self.shape, generator=self.generator)
        labels = None
        if classes is not None:
            labels = torch.randint(classes, (one.batch,), generator=self.generator)
        draws = one.objective.draw(self.generator, one.batch, self.shape, classes is not None)
        self.step.step = min(one.steps - 1, int((point + 0.5) / POINTS * one.steps))
        _wait(self.device)
        started = time.perf_counter()
        self.step(Batch(x0, labels), draws)
        _wait(self.device)
        return time.perf_counter() - started


def _training(trained: Sequence[Trained], device: torch.device) -> tuple[list[float], list[float]]:
    steps = [TimedTraining(one, device) for one in trained]
    for step in steps:
        step(0)
    # The methods in turn at each point, so that a slow moment of the machine meets them all.
    taken = [[min(step(p) for _ in range(REPEATS)) for step in steps] for p in range(POINTS)]
    seconds = [statistics.mean(times) for times in zip(*taken, strict=True)]
    del steps
    return seconds, [_peak(one, device) for one in trained]


def _peak(one: Trained, device: torch.device) -> float:
    """Bytes of all tensors alive at once, at most, from before the network is built until a few steps are done."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _few_steps(one, device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    from torch.autograd.profiler import profile

    with profile(profile_memory=True) as profiled:
        _few_steps(one, device)
    records = [e for e in profiled.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for record in sorted(records, key=lambda record: record.start_ns()):
        live += record.nbytes()
        peak = max(peak, live)
    return float(peak)


def _few_steps(one: Trained, device: torch.device) -> None:
    step = TimedTraining(one, device)
    for point in (0, POINTS // 2, POINTS - 1):
        step(point)


def _sampling(sampled: Sequence[Sampled], device: torch.device) -> list[float]:
    runs = []
    for one in sampled:
        torch.manual_seed(0)
        runs.append((one, DiT(one.network).to(device).eval()))
    for one, network in runs:
        _time_of_images(one, network, device, steps=min(one.steps, 2))
    taken = [[_time_of_images(one, net, device, one.steps) for one, net in runs] for _ in range(REPEATS)]
    return [min(times) / IMAGES for times in zip(*taken, strict=True)]


def _time_of_images(one: Sampled, network: DiT, device: torch.device, steps: int) -> float:
    indices = torch.arange(IMAGES)
    labels: Tensor | None = None
    if one.network.classes is not None:
        labels = indices % one.network.classes
    _wait(device)
    started = time.perf_counter()
    generate(network, one.objective, 0, indices, labels, steps, device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(asked: str, answered: str) -> None:
    """Answer what a file asks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    questions = json.loads(Path(asked).read_text())
    seconds, peaks = _training([Trained(**_read(q)) for q in questions["trained"]], device)
    images = _sampling([Sampled(**_read(q)) for q in questions["sampled"]], device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    Path(answered).write_text(json.dumps(asdict(Costs(name, 1, seconds, peaks, images))))


if __name__ == "__main__":
    main(*sys.argv[1:])
