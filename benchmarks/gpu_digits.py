"""A training on the real digits with its score, in a given time: a section of benchmarks/gpu.sh."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from measurements import Results
from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import Batch, SoFlow
from soflow_core.optimizer import OptimizerConfig
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_pipelines.features.digits import digits_classifier
from soflow_pipelines.images.convert import to_unit_range
from soflow_pipelines.metrics.fid import FeatureStatistics, frechet_distance
from soflow_pipelines.sources.digits import load_digits

if TYPE_CHECKING:
    from gpu_suite import Options

CONFIG = DiTConfig(
    channels=1, height=8, width=8, patch=2, hidden=96, depth=4, heads=4, classes=10, null_label=True
)
"""That of sweeps/digits.yaml."""
BATCH, MOST_STEPS, TIMED = 128, 20_000, 20
SAMPLES = 2000
TRAINING_SECONDS = 150


def train_digits(results: Results, options: Options) -> None:
    """Train SoFlow for as many steps as fit into the time, and score the average in one step and in two."""
    device, small = options.device, options.small
    budget = min(options.left - 15, 8 if small else TRAINING_SECONDS)
    data = load_digits()
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    x0, y = to_unit_range(images).to(device), labels.to(device)
    objective, generator = SoFlow(), torch.Generator().manual_seed(0)

    def step_of(training: TrainStep) -> None:
        rows = torch.randint(len(x0), (BATCH,), generator=generator).to(device)
        draws = objective.draw(generator, BATCH, (1, 8, 8), conditional=True)
        record = training(Batch(x0[rows], y[rows]), draws)
        if not record.finite:
            raise RuntimeError(f"{record.culprit} is not finite at step {record.step}")

    def new(steps: int) -> TrainStep:
        torch.manual_seed(0)
        settings = TrainStepConfig(
            steps,
            OptimizerConfig(lr=1e-3),
            ema_decays=(0.99 if steps < 2000 else 0.999,),
            precision="float32",
        )
        return TrainStep(DiT(CONFIG).to(device), objective, settings)

    trial = new(2 * TIMED)
    for _ in range(TIMED):
        step_of(trial)
    started = time.perf_counter()
    for _ in range(TIMED):
        step_of(trial)
    rate = TIMED / (time.perf_counter() - started)
    # The schedules end with the last step, so that their number is fixed before the training.
    steps = max(10, min(MOST_STEPS, int(0.9 * budget * rate)))
    training, started = new(steps), time.perf_counter()
    for _ in range(steps):
        step_of(training)
    seconds = time.perf_counter() - started
    results.add("digits", "steps", steps)
    results.add("digits", "images/s of training", steps * BATCH / seconds, "images/s", "higher")
    with tempfile.TemporaryDirectory(prefix="soflow-digits-") as folder:
        classifier = digits_classifier(Path(folder))
    real = FeatureStatistics(classifier.dim)
    real.update(classifier(images).features)
    asked = torch.arange(200 if small else SAMPLES) % 10
    for count in (1, 2):
        made = _samples(training, objective, asked, count, device)
        described = classifier(made)
        statistics = FeatureStatistics(classifier.dim)
        statistics.update(described.features)
        distance = frechet_distance(real.moments(), statistics.moments())
        agreement = float((described.logits.argmax(dim=1) == asked).float().mean())
        results.add("digits", f"Frechet distance, {count} step(s)", distance, "", "lower")
        results.add("digits", f"label agreement, {count} step(s)", agreement, "", "higher")
        print(
            f"digits after {steps:,} steps: {count} step(s), distance {distance:.4g}, agreement {agreement:.3f}",
            flush=True,
        )


@torch.no_grad()
def _samples(
    training: TrainStep, objective: SoFlow, labels: torch.Tensor, steps: int, device: torch.device
) -> torch.Tensor:
    """Images (N, 1, 8, 8) uint8 of the averaged network."""
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(len(labels), 1, 8, 8, generator=generator).to(device) for _ in range(steps)]
    with training.averaged() as network:
        made = objective.sample(network, noise[0], labels.to(device), steps, noise[1:])
    return (127.5 * made.cpu() + 128).clamp(0, 255).to(torch.uint8)
