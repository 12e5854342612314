"""What guidance as a condition of SoFlow costs on the digits: one network for a range of scales against one trained at a scale alone.

    python benchmarks/guidance_condition.py --out guidance --plot guidance.png
    python benchmarks/guidance_condition.py --steps 20 --seeds 2 --samples 200 --scales 1 3 --out guidance-small

Both are the network of sweeps/digits.yaml, trained with the same batches, noise and initial seeds; in one the scale w of the target is
drawn log-uniformly from 1 to 4 for each row and is an input (`objective.guidance.scale: {low: 1, high: 4}`), in the other it is 3.
Scored are one-step samples of the averaged weights on the digits classifier's features, balanced over the classes, from two noises
that are the same for all networks. Each training is kept in --out, so that the same command goes on where it was cut.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from gpu_digits import CONFIG
from soflow_core.guidance import Guidance, ScaleRange
from soflow_core.networks import DiT
from soflow_core.objectives import Batch, SoFlow
from soflow_core.optimizer import OptimizerConfig
from soflow_core.samplers.noise import sample_labels, sample_noise
from soflow_core.times import RatioSchedule
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_pipelines.features.digits import digits_classifier
from soflow_pipelines.images.convert import to_uint8, to_unit_range
from soflow_pipelines.metrics import Reference, ScoreStatistics, scores
from soflow_pipelines.preparation.builtin import ensure_builtin
from soflow_pipelines.references.reference_store import open_reference
from soflow_pipelines.sources.digits import load_digits

CONDITION, ALONE = "condition", "alone"
METRICS = ("fd", "precision", "recall", "label_agreement")
NOISES = (1000, 1001)
"""Seeds of the noise that networks are scored by; the values of both are averaged."""
CONFIDENCE = 0.95
CHUNK = 250


@dataclass(frozen=True)
class Options:
    """Sizes of the comparison."""

    steps: int
    batch: int
    seeds: int
    samples: int
    scales: tuple[float, ...]
    alone: float
    high: float
    """Upper end of the range of scales, which begins at 1."""


@dataclass(frozen=True)
class Scorer:
    """Scores samples of digits on their classifier's features."""

    folder: Path
    reference: Reference

    @classmethod
    def open(cls, folder: Path) -> Scorer:
        """Write digits and classifier to a folder, and compute the statistics of the digits."""
        place = ensure_builtin("digits", folder / "digits")
        return cls(folder, open_reference(place, digits_classifier(folder), METRICS, folder))

    def __call__(self, training: TrainStep, scale: float | None, samples: int) -> dict[str, float]:
        """Each metric of one-step samples at a guidance scale, None for the trained one, averaged over the noises."""
        objective = replace(training.objective, sampling_scale=scale)  # type: ignore[type-var]
        values: list[dict[str, float]] = []
        for seed in NOISES:
            statistics_of = ScoreStatistics(digits_classifier(self.folder), METRICS, samples=samples)
            with torch.no_grad(), training.averaged() as network:
                for indices in torch.arange(samples).split(CHUNK):
                    labels = sample_labels(seed, indices, 10, balanced=True)
                    noise = sample_noise(seed, indices, CONFIG.sample_shape)
                    made = objective.sample(network, noise, labels, 1)
                    statistics_of.update(indices, to_uint8(made), labels)
            values.append(scores(statistics_of, self.reference, METRICS).values)
        return {name: statistics.mean(each[name] for each in values) for name in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each network")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--alone", type=float, default=3.0, help="scale of the network of one scale")
    parser.add_argument("--high", type=float, default=4.0, help="upper end of the range of scales")
    parser.add_argument("--out", type=Path, help="folder in which trainings are kept; default: none is")
    parser.add_argument("--plot", type=Path, help="PNG of all metrics against the scale")
    given = parser.parse_args()
    if given.alone not in given.scales or max(given.scales) > given.high:
        parser.error("--scales must hold --alone, and none above --high")
    options = Options(
        given.steps,
        given.batch,
        given.seeds,
        given.samples,
        tuple(given.scales),
        given.alone,
        given.high,
    )
    with tempfile.TemporaryDirectory(prefix="soflow-guidance-") as folder:
        scorer = Scorer.open(Path(folder))
        results = compare(options, scorer, given.out)
    print(table(options, results))
    print(verdict(options, results))
    if given.plot is not None:
        draw(options, results, given.plot)


Results = dict[str, list[dict[str, dict[str, float]]]]
"""Network -> for each seed: scale -> metric -> value."""


def compare(options: Options, scorer: Scorer, out: Path | None) -> Results:
    """Train and score both networks for each seed, in turn; what is in `out` already is read."""
    results: Results = {CONDITION: [], ALONE: []}
    for seed in range(options.seeds):
        for kind, rows in results.items():
            path = None if out is None else out / f"{kind}-{seed}.json"
            kept = _kept(path, options)
            if kept is None:
                started = time.perf_counter()
                kept = _trained(kind, seed, options, scorer)
                at_scale = kept[f"{options.alone:g}"]
                print(
                    f"seed {seed}, {kind}: fd {at_scale['fd']:.3f} at {options.alone:g} "
                    f"({time.perf_counter() - started:.0f} s)",
                    flush=True,
                )
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    aside = path.with_suffix(".part")
                    aside.write_text(json.dumps({"options": _deciding(options), "scores": kept}, indent=1))
                    aside.replace(path)
            rows.append(kept)
    return results


def _deciding(options: Options) -> dict[str, Any]:
    return {
        "steps": options.steps,
        "batch": options.batch,
        "samples": options.samples,
        "scales": list(options.scales),
        "alone": options.alone,
        "high": options.high,
    }


def _kept(path: Path | None, options: Options) -> dict[str, dict[str, float]] | None:
    if path is None or not path.exists():
        return None
    content = json.loads(path.read_text())
    if content["options"] != _deciding(options):
        raise SystemExit(f"{path} is of other options: name another folder with --out, or give the same.")
    found: dict[str, dict[str, float]] = content["scores"]
    return found


def _trained(kind: str, seed: int, options: Options, scorer: Scorer) -> dict[str, dict[str, float]]:
    """Scale -> metrics of a network that is trained now; that of one scale has its own alone."""
    condition = kind == CONDITION
    training = train(condition, seed, options)
    if not condition:
        return {f"{options.alone:g}": scorer(training, None, options.samples)}
    return {f"{scale:g}": scorer(training, scale, options.samples) for scale in options.scales}


def train(condition: bool, seed: int, options: Options) -> TrainStep:
    """Train one network of sweeps/digits.yaml on all digits."""
    scale = ScaleRange(1.0, options.high) if condition else options.alone
    schedule = RatioSchedule(kind="exponential", initial=0.1, final=0.002)
    objective = SoFlow(guidance=Guidance(scale=scale), schedule=schedule)
    data = load_digits()
    x0, labels = to_unit_range(torch.from_numpy(data.images)), torch.from_numpy(data.labels)
    torch.manual_seed(seed)
    network = DiT(replace(CONFIG, guidance_scale=condition))
    settings = TrainStepConfig(
        options.steps, OptimizerConfig(lr=1e-3), ema_decays=(0.99,), precision="float32"
    )
    training = TrainStep(network, objective, settings)
    for step in range(options.steps):
        batch, noise = _inputs(x0, labels, objective, seed, step, options.batch)
        record = training(batch, noise)
        if not record.finite:
            raise SystemExit(f"{record.culprit} is not finite at step {record.step}")
    return training


def _inputs(
    x0: Tensor, labels: Tensor, objective: SoFlow, seed: int, step: int, size: int
) -> tuple[Batch, Any]:
    """Rows, noise and times of a step, the same for both networks: scales are drawn last."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    rows = torch.randint(len(x0), (size,), generator=generator)
    return Batch(x0[rows], labels[rows]), objective.draw(generator, size, CONFIG.sample_shape, True)


def spread(values: Sequence[float]) -> str:
    """`mean ± standard deviation`."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def table(options: Options, results: Results) -> str:
    """The results as a table in Markdown: a row for each scale, and the network of one scale."""
    lines = [f"| network | w | {' | '.join(METRICS)} |", f"|---|---|{'---|' * len(METRICS)}"]
    for kind, scales in ((CONDITION, options.scales), (ALONE, (options.alone,))):
        for scale in scales:
            cells = [spread([row[f"{scale:g}"][name] for row in results[kind]]) for name in METRICS]
            lines.append(f"| {kind} | {scale:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(options: Options, results: Results) -> str:
    """What the condition costs in distance at the scale that both have, with Student's interval over paired seeds."""
    scale = f"{options.alone:g}"
    costs = [
        condition[scale]["fd"] - alone[scale]["fd"]
        for condition, alone in zip(results[CONDITION], results[ALONE], strict=True)
    ]
    mean = statistics.mean(costs)
    if len(costs) < 2:
        return f"at w = {scale} the condition costs {mean:+.3f} fd (one seed: its noise is not known)"
    bound = float(stdtrit(len(costs) - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(costs) / len(costs) ** 0.5
    says = "more than the noise" if abs(mean) > bound else "within the noise"
    return (
        f"at w = {scale} the condition costs {mean:+.3f} ± {bound:.3f} fd over {len(costs)} paired seeds "
        f"({100 * CONFIDENCE:.0f} % interval): {says}"
    )


def draw(options: Options, results: Results, path: Path) -> None:
    """PNG with a panel for each metric: the curve of the condition, and the network of one scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(METRICS), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(METRICS), squeeze=False)[0]
    for panel, name in zip(panels, METRICS, strict=True):
        for kind, scales in ((CONDITION, options.scales), (ALONE, (options.alone,))):
            values = [[row[f"{scale:g}"][name] for row in results[kind]] for scale in scales]
            deviations = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
            means = [statistics.mean(each) for each in values]
            panel.errorbar(scales, means, deviations, marker="o", capsize=3, label=kind)
        panel.set(title=name, xlabel="guidance scale w")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
