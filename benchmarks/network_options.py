"""What each option of the DiT is worth on the digits: Fréchet distance with its spread over seeds, and seconds a step.

    python benchmarks/network_options.py --steps 2000 --seeds 3
    python benchmarks/network_options.py --steps 20 --seeds 2 --samples 200 --only none rope

Every network is that of sweeps/digits.yaml but for the option. All train with SoFlow on the same batches, draws and initial seeds, in
turn, so that a machine that slows down slows all of them. The distance is that of the digits classifier's features, as in the
digits sweep, of samples in one step with the averaged weights against the images trained on.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_digits import CONFIG
from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import Batch, SoFlow
from soflow_core.optimizer import OptimizerConfig
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_pipelines.features.digits import digits_classifier
from soflow_pipelines.images.convert import to_unit_range
from soflow_pipelines.metrics.fid import FeatureStatistics, frechet_distance
from soflow_pipelines.sources.digits import load_digits

BATCH = 128
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "qk_norm": {"qk_norm": True},
    "rope": {"rope": True},
    "swiglu": {"swiglu": True},
    "registers 4": {"registers": 4},
    "condition_tokens 4": {"condition_tokens": 4},
    "all": {"qk_norm": True, "rope": True, "swiglu": True, "registers": 4, "condition_tokens": 4},
}


@dataclass
class Row:
    """Results of one network over the seeds."""

    config: DiTConfig
    distances: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each step, its loss and update."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--only", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows = {name: Row(replace(CONFIG, **OPTIONS[name])) for name in options.only}
    data = load_digits()
    x0 = to_unit_range(torch.from_numpy(data.images)).to(options.device)
    labels = torch.from_numpy(data.labels).to(options.device)
    for seed in range(options.seeds):
        for name, row in rows.items():
            training = train(row, x0, labels, options.steps, seed)
            row.distances.append(score(training, torch.from_numpy(data.images), options.samples, seed))
            print(f"seed {seed}, {name}: distance {row.distances[-1]:.3f}", flush=True)
    print(table(rows))


def train(row: Row, x0: Tensor, labels: Tensor, steps: int, seed: int) -> TrainStep:
    """Trains one network; its times go to the row."""
    torch.manual_seed(seed)
    objective, generator = SoFlow(), torch.Generator().manual_seed(seed)
    decay = 0.99 if steps < 2000 else 0.999
    settings = TrainStepConfig(steps, OptimizerConfig(lr=1e-3), ema_decays=(decay,), precision="float32")
    training = TrainStep(DiT(row.config).to(x0.device), objective, settings)
    for _ in range(steps):
        chosen = torch.randint(len(x0), (BATCH,), generator=generator).to(x0.device)
        draws = objective.draw(generator, BATCH, tuple(x0.shape[1:]), conditional=True)
        start = time.perf_counter()
        record = training(Batch(x0[chosen], labels[chosen]), draws)
        row.seconds.append(time.perf_counter() - start)
        if not record.finite:
            raise SystemExit(f"{record.culprit} is not finite at step {record.step}")
    return training


@torch.no_grad()
def score(training: TrainStep, images: Tensor, samples: int, seed: int) -> float:
    """Fréchet distance of one-step samples, balanced over the classes, to the images."""
    with tempfile.TemporaryDirectory(prefix="soflow-digits-") as folder:
        classifier = digits_classifier(Path(folder))
    generator = torch.Generator().manual_seed(1000 + seed)
    noise = torch.randn(samples, *CONFIG.sample_shape, generator=generator).to(training.device)
    labels = torch.arange(samples, device=training.device) % 10
    with training.averaged() as network:
        made = training.objective.sample(network, noise, labels, 1)
    pixels = (127.5 * made.cpu() + 128).clamp(0, 255).to(torch.uint8)
    generated, real = (FeatureStatistics(classifier.dim) for _ in range(2))
    generated.update(classifier(pixels).features)
    real.update(classifier(images).features)
    return float(frechet_distance(real.moments(), generated.moments()))


def table(rows: dict[str, Row]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| network | parameters | MFLOP a pass | distance, mean (spread) | ms a step |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        spread = statistics.stdev(row.distances) if len(row.distances) > 1 else float("nan")
        lines.append(
            f"| {name} | {row.config.parameters():,} | {row.config.forward_flops() / 1e6:.2f} | "
            f"{statistics.mean(row.distances):.3f} ({spread:.3f}) | {1000 * statistics.median(row.seconds):.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
