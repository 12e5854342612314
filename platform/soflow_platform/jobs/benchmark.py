"""Benchmarks of methods on this machine: seconds and memory of a training step, seconds of sampling an image.

    python -m soflow_platform.jobs.benchmark REQUEST.json RESULT.json

A subprocess with one CPU thread measures all methods in turn, several times over, so that a slow moment of the machine does not affect
one method alone. It holds one network at a time. Weights are as initialized: time and memory do not depend on them.
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

from soflow_core.networks import NETWORKS, Architecture, NetworkModule
from soflow_core.objectives import OBJECTIVES, Batch, Objective
from soflow_core.plugins import VARIABLE, loaded
from soflow_core.settings import to_dict
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import JobError
from soflow_platform.training.step_builder import build_train_step

POINTS = 6
"""Points of the training schedule at which a step is timed, because its work changes along the schedule."""
ROUNDS = 2
"""Times that each method is measured; the shortest time counts."""
IMAGES = 64
"""Batch size at which sampling is timed."""


@dataclass(frozen=True)
class TrainingBenchmark:
    """Training steps of a trial: one worker's share of a batch, without communication between workers."""

    network: Architecture
    experiment: Experiment


@dataclass(frozen=True)
class SamplingBenchmark:
    """Sampling with a method in a number of steps."""

    network: Architecture
    objective: Objective
    steps: int


@dataclass(frozen=True)
class Costs:
    """Results of the benchmarks, measured on one machine in one run."""

    device: str
    threads: int
    step_seconds: list[float]
    """For each training: seconds of a step, averaged over its schedule."""
    peak_bytes: list[float]
    """For each training: peak bytes of all live tensors, including weights, optimizer state and EMAs."""
    image_seconds: list[float] = field(default_factory=list)
    """For each sampling: seconds of one image in a batch of IMAGES, without drawing its noise."""


def measure_costs(trainings: Sequence[TrainingBenchmark], samplings: Sequence[SamplingBenchmark]) -> Costs:
    """Run the benchmarks in a subprocess and return their results. Raises JobError where it fails."""
    request = {
        "trainings": [
            {"network": to_dict(each.network), "experiment": each.experiment.resolved()} for each in trainings
        ],
        "samplings": [
            {"network": to_dict(each.network), "objective": to_dict(each.objective), "steps": each.steps}
            for each in samplings
        ],
    }
    with tempfile.TemporaryDirectory(prefix="soflow-costs-") as folder:
        request_path, result_path = Path(folder) / "request.json", Path(folder) / "result.json"
        request_path.write_text(json.dumps(request))
        command = [
            sys.executable,
            "-m",
            "soflow_platform.jobs.benchmark",
            str(request_path),
            str(result_path),
        ]
        named = {VARIABLE: os.pathsep.join(plugin.path for plugin in loaded())} if loaded() else {}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **named}
        )
        if done.returncode:
            raise JobError(f"the costs could not be measured: {_failure(done)}")
        return Costs(**json.loads(result_path.read_text()))


def _failure(done: subprocess.CompletedProcess[str]) -> str:
    """Why the subprocess failed: its signal, such as that of the kernel's out-of-memory killer, else its last line."""
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else "the benchmark process failed without an error message"


def _training_benchmark(request: dict[str, Any]) -> TrainingBenchmark:
    # The experiment first: it imports the plugins that the network may come from.
    experiment = Experiment(**request["experiment"])
    return TrainingBenchmark(NETWORKS.read(request["network"]), experiment)


def _sampling_benchmark(request: dict[str, Any]) -> SamplingBenchmark:
    return SamplingBenchmark(
        NETWORKS.read(request["network"]),
        OBJECTIVES.read(request["objective"]),
        request["steps"],
    )


class TimedTraining:
    """A training step on random data, timed."""

    def __init__(self, benchmark: TrainingBenchmark, device: torch.device) -> None:
        self.benchmark, self.device = benchmark, device
        self.step = build_train_step(benchmark.experiment, benchmark.network, device, world=1)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, point: int) -> float:
        """Seconds of a step at place `point` of the schedule, 0 to POINTS - 1."""
        network, experiment = self.benchmark.network, self.benchmark.experiment
        training, workers = experiment.training, experiment.resources.workers
        shape = network.sample_shape
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
    benchmarks: Sequence[TrainingBenchmark], device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of a step and peak bytes for each benchmark."""
    shortest = [[math.inf] * POINTS for _ in benchmarks]
    for _ in range(ROUNDS):
        for number, benchmark in enumerate(benchmarks):
            pairs = zip(shortest[number], _step_times(benchmark, device), strict=True)
            shortest[number] = [min(pair) for pair in pairs]
    peaks = [measure_peak(benchmark, device) for benchmark in benchmarks]
    return [statistics.mean(times) for times in shortest], peaks


def _step_times(benchmark: TrainingBenchmark, device: torch.device) -> list[float]:
    """Seconds of a step at each place of the schedule."""
    _free(device)
    step = TimedTraining(benchmark, device)
    # Code that runs only at a later place is compiled when that place is first reached.
    for point in range(POINTS) if benchmark.experiment.training.compile else (0,):
        step(point)
    return [step(point) for point in range(POINTS)]


def measure_peak(benchmark: TrainingBenchmark, device: torch.device) -> float:
    """Peak bytes of live tensors, from before the network is built until a few steps are done."""
    _free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _few_steps(benchmark, device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    from torch.autograd.profiler import profile

    with profile(profile_memory=True) as profiled:
        _few_steps(benchmark, device)
    records = [e for e in profiled.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for record in sorted(records, key=lambda record: record.start_ns()):
        live += record.nbytes()
        peak = max(peak, live)
    return float(peak)


def _few_steps(benchmark: TrainingBenchmark, device: torch.device) -> None:
    step = TimedTraining(benchmark, device)
    for point in (0, POINTS // 2, POINTS - 1):
        step(point)


def measure_sampling(benchmarks: Sequence[SamplingBenchmark], device: torch.device) -> list[float]:
    """Seconds of an image for each benchmark."""
    shortest = [math.inf] * len(benchmarks)
    for _ in range(ROUNDS):
        for config in dict.fromkeys(benchmark.network for benchmark in benchmarks):
            _free(device)
            network = config.build().to(device).eval()
            for number, benchmark in enumerate(benchmarks):
                if benchmark.network == config:
                    _sampling_seconds(benchmark, network, device, steps=min(benchmark.steps, 2))
                    seconds = _sampling_seconds(benchmark, network, device, benchmark.steps)
                    shortest[number] = min(shortest[number], seconds)
            del network
    return [seconds / IMAGES for seconds in shortest]


@torch.inference_mode()
def _sampling_seconds(
    benchmark: SamplingBenchmark, network: NetworkModule, device: torch.device, steps: int
) -> float:
    """Seconds of IMAGES images. Noise is drawn before the clock starts, because drawing it is not part of the method."""
    config = benchmark.network
    noise = torch.randn(IMAGES, *config.sample_shape).to(device)
    labels: Tensor | None = None
    if config.classes is not None:
        labels = (torch.arange(IMAGES) % config.classes).to(device)
    _wait(device)
    started = time.perf_counter()
    benchmark.objective.sample(network, noise, labels, steps, [noise] * (steps - 1))
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    """Free the network that was measured before, and the code compiled for it."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(request_path: str, result_path: str) -> None:
    """Run the benchmarks of a request file and write their results."""
    # cuBLAS is deterministic only with this, and reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    request = json.loads(Path(request_path).read_text())
    seconds, peaks = measure_training([_training_benchmark(each) for each in request["trainings"]], device)
    images = measure_sampling([_sampling_benchmark(each) for each in request["samplings"]], device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    Path(result_path).write_text(json.dumps(asdict(Costs(name, 1, seconds, peaks, images))))


if __name__ == "__main__":
    main(*sys.argv[1:])
