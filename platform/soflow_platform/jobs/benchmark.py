"""What a method costs on this machine: seconds and memory of a training step, seconds of an image.

    python -m soflow_platform.jobs.benchmark QUESTIONS.json ANSWERS.json

A process of its own, with one thread on a CPU, measures all methods in turn and goes through them more than once, so that a slow moment
of the machine does not fall on one alone. It holds one network at a time. Weights are as they are initialized: time and memory do not
depend on them.
"""

from __future__ import annotations

import gc
import json
import math
import os
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
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import JobError
from soflow_platform.training.step_builder import build_train_step

POINTS = 6
"""Places of training at which a step is timed: schedules change what it does."""
ROUNDS = 2
"""Times that all methods are gone through; the shorter time counts."""
IMAGES = 64
"""Images made at once where sampling is timed."""


@dataclass(frozen=True)
class TrainingBenchmark:
    """A method as a trial trains it: one worker's share of a batch, without the exchange between workers."""

    network: DiTConfig
    experiment: Experiment


@dataclass(frozen=True)
class SamplingBenchmark:
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
    """Of each way of sampling: one image of a batch of 64, its noise given."""


def measure_costs(trained: Sequence[TrainingBenchmark], sampled: Sequence[SamplingBenchmark]) -> Costs:
    """Measure in a process of its own. Raises JobError where it fails."""
    questions = {
        "trained": [
            {"network": to_dict(one.network), "experiment": one.experiment.resolved()} for one in trained
        ],
        "sampled": [
            {"network": to_dict(one.network), "objective": to_dict(one.objective), "steps": one.steps}
            for one in sampled
        ],
    }
    with tempfile.TemporaryDirectory(prefix="soflow-costs-") as folder:
        asked, answered = Path(folder) / "questions.json", Path(folder) / "answers.json"
        asked.write_text(json.dumps(questions))
        command = [sys.executable, "-m", "soflow_platform.jobs.benchmark", str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no word of why"]
            # A process that is killed, for its memory, says nothing of it.
            why = f"ended by signal {-done.returncode}" if done.returncode < 0 else said[-1]
            raise JobError(f"the costs could not be measured: {why}")
        return Costs(**json.loads(answered.read_text()))


def _trained(question: dict[str, Any]) -> TrainingBenchmark:
    return TrainingBenchmark(from_dict(DiTConfig, question["network"]), Experiment(**question["experiment"]))


def _sampled(question: dict[str, Any]) -> SamplingBenchmark:
    objective = question["objective"]
    return SamplingBenchmark(
        from_dict(DiTConfig, question["network"]),
        from_dict(OBJECTIVES[objective["method"]], objective),
        question["steps"],
    )


class TimedTraining:
    """One method's training step, on data that do not matter."""

    def __init__(self, one: TrainingBenchmark, device: torch.device) -> None:
        self.one, self.device = one, device
        self.step = build_train_step(one.experiment, one.network, device, world=1)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, point: int) -> float:
        """Seconds of a step at this place of the schedule, out of POINTS."""
        network, experiment = self.one.network, self.one.experiment
        training, workers = experiment.training, experiment.resources.workers
        shape = (network.channels, network.height, network.width)
        x0 = torch.randn(training.batch, *shape, generator=self.generator)
        labels = None
        if network.classes is not None:
            labels = torch.randint(network.classes, (training.batch,), generator=self.generator)
        draws = experiment.objective.draw(self.generator, training.batch, shape, labels is not None)
        batch, draws = Batch(x0, labels).rows(0, workers), draws.rows(0, workers)
        self.step.step = min(training.steps - 1, int((point + 0.5) / POINTS * training.steps))
        _wait(self.device)
        started = time.perf_counter()
        self.step(batch, draws)
        _wait(self.device)
        return time.perf_counter() - started


def measure_training(
    trained: Sequence[TrainingBenchmark], device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of a step and peak bytes, of each method."""
    shortest = [[math.inf] * POINTS for _ in trained]
    for _ in range(ROUNDS):
        for number, one in enumerate(trained):
            taken = zip(shortest[number], _step_times(one, device), strict=True)
            shortest[number] = [min(times) for times in taken]
    peaks = [_peak(one, device) for one in trained]
    return [statistics.mean(times) for times in shortest], peaks


def _step_times(one: TrainingBenchmark, device: torch.device) -> list[float]:
    """Seconds of a step at each place of the schedule."""
    _free(device)
    step = TimedTraining(one, device)
    # A place where the method does something new is compiled for when it is first met.
    for point in range(POINTS) if one.experiment.training.compile else (0,):
        step(point)
    return [step(point) for point in range(POINTS)]


def _peak(one: TrainingBenchmark, device: torch.device) -> float:
    """Bytes of all tensors alive at once, at most, from before the network is built until a few steps are done."""
    _free(device)
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


def _few_steps(one: TrainingBenchmark, device: torch.device) -> None:
    step = TimedTraining(one, device)
    for point in (0, POINTS // 2, POINTS - 1):
        step(point)


def measure_sampling(sampled: Sequence[SamplingBenchmark], device: torch.device) -> list[float]:
    """Seconds of an image, of each way of sampling."""
    shortest = [math.inf] * len(sampled)
    for _ in range(ROUNDS):
        for config in dict.fromkeys(one.network for one in sampled):
            _free(device)
            network = DiT(config).to(device).eval()
            for number, one in enumerate(sampled):
                if one.network == config:
                    _time_of_images(one, network, device, steps=min(one.steps, 2))
                    taken = _time_of_images(one, network, device, one.steps)
                    shortest[number] = min(shortest[number], taken)
            del network
    return [seconds / IMAGES for seconds in shortest]


@torch.inference_mode()
def _time_of_images(one: SamplingBenchmark, network: DiT, device: torch.device, steps: int) -> float:
    """Seconds of IMAGES images. Noise is drawn before the clock starts: how it is drawn is not the method's."""
    config = one.network
    noise = torch.randn(IMAGES, config.channels, config.height, config.width).to(device)
    labels: Tensor | None = None
    if config.classes is not None:
        labels = (torch.arange(IMAGES) % config.classes).to(device)
    _wait(device)
    started = time.perf_counter()
    one.objective.sample(network, noise, labels, steps, [noise] * (steps - 1))
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    """Let go of the network that was measured before, and of what was compiled for it."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(asked: str, answered: str) -> None:
    """Answer what a file asks."""
    # cuBLAS is deterministic only with this, and reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    questions = json.loads(Path(asked).read_text())
    seconds, peaks = measure_training([_trained(q) for q in questions["trained"]], device)
    images = measure_sampling([_sampled(q) for q in questions["sampled"]], device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    Path(answered).write_text(json.dumps(asdict(Costs(name, 1, seconds, peaks, images))))


if __name__ == "__main__":
    main(*sys.argv[1:])
