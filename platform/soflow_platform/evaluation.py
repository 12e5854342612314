"""Scores of a network's samples during training: Fréchet distance and label agreement at given numbers of evaluations.

Sample i is a function of (evaluation seed, i) and the weights alone, so that evaluating changes no random number of the training,
and every evaluation of a sweep sees the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soflow_core.networks import DiT
from soflow_core.objectives import Objective
from soflow_core.samplers.noise import sample_labels, sample_noise
from soflow_pipelines.features import FeatureNetwork, digits_classifier
from soflow_pipelines.images import to_uint8
from soflow_pipelines.loader import ShardLoader
from soflow_pipelines.metrics import FeatureStatistics, frechet_distance
from soflow_pipelines.pooling import PooledFeatures
from soflow_pipelines.shards import DatasetInfo
from soflow_pipelines.writers import image_grid
from soflow_platform.config.evaluation import EvaluationConfig
from soflow_platform.storage import Storage

REFERENCE_LIMIT = 50_000
"""Training samples that the reference statistics are taken of, at most."""

VISIBLE_PIXELS = 48
"""Smallest side of an image in a grid."""

Merge = Callable[[list[Any]], list[Any]]
"""All ranks' contributions, in rank order."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and one sample grid (H, W, 3) uint8 for each number of evaluations."""

    metrics: dict[str, float]
    grids: dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Evaluator:
    """Scores networks that make samples like those of one data set."""

    config: EvaluationConfig
    info: DatasetInfo
    classes: int | None
    """Number of classes; None for unconditional training."""
    features: FeatureNetwork | PooledFeatures
    reference: FeatureStatistics

    @classmethod
    def open(
        cls, config: EvaluationConfig, info: DatasetInfo, data: str, conditional: bool, storage: Storage
    ) -> Evaluator:
        """Load the feature network and the reference statistics, making and keeping both where they are missing."""
        features = feature_network(config, info, storage)
        reference = reference_statistics(features, info, data, storage)
        return cls(config, info, info.classes if conditional else None, features, reference)

    def evaluate(
        self,
        network: DiT,
        objective: Objective,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        merge: Merge = list,
    ) -> Evaluation:
        """Score `network`; each rank makes every world-th batch, and `merge` brings the parts together."""
        metrics: dict[str, float] = {}
        for nfe in self.config.nfe:
            statistics, recognised, total = FeatureStatistics(self.features.dim), 0, 0
            for indices in self._batches(rank, world):
                labels = self._labels(indices)
                samples = generate(network, objective, self.config.seed, indices, labels, nfe, device)
                found = self.features(as_seen(self.features, samples))
                statistics.update(found.features)
                if found.logits is not None and labels is not None:
                    recognised += int((found.logits.argmax(1).cpu() == labels).sum())
                total += len(indices)
            parts = merge([(statistics.state(), recognised, total)])
            whole = FeatureStatistics(self.features.dim)
            for state, _, _ in parts:
                whole.merge(FeatureStatistics.from_state(state))
            metrics[f"eval/fd_nfe{nfe}"] = frechet_distance(whole, self.reference)
            name = f"eval/label_agreement_nfe{nfe}"
            if name in self.config.metrics(self.classes is not None):
                metrics[name] = sum(p[1] for p in parts) / sum(p[2] for p in parts)
        return Evaluation(metrics, self.grids(network, objective, device) if rank == 0 else {})

    def grids(
        self, network: DiT, objective: Objective, device: torch.device
    ) -> dict[str, np.ndarray[Any, Any]]:
        """One sample grid for each number of evaluations, by the name it is logged under."""
        return {f"samples/nfe{nfe}": self.grid(network, objective, nfe, device) for nfe in self.config.nfe}

    def grid(
        self, network: DiT, objective: Objective, nfe: int, device: torch.device
    ) -> np.ndarray[Any, Any]:
        """A square of samples, one class to a row, from noise that no scored sample uses."""
        side = self.config.grid
        indices = torch.arange(side * side) + (1 << 40)
        labels = None
        if self.classes is not None:
            labels = (torch.arange(side) * self.classes // side).repeat_interleave(side)
        samples = generate(network, objective, self.config.seed, indices, labels, nfe, device)
        return grid_image(viewable(samples), columns=side)

    def tags(self) -> dict[str, str]:
        """Everything besides the weights that can move the numbers."""
        return {
            "eval.features": self.features.id,
            "eval.reference": f"{short_digest(self.info)} ({self.reference.count} samples)",
            "eval.samples": str(self.config.samples),
            "eval.nfe": ",".join(map(str, self.config.nfe)),
            "eval.labels": self.config.labels if self.classes is not None else "none",
            "eval.seed": str(self.config.seed),
        }

    def _batches(self, rank: int, world: int) -> Iterator[Tensor]:
        everything = torch.arange(self.config.samples).split(self.config.batch)
        yield from everything[rank::world]

    def _labels(self, indices: Tensor) -> Tensor | None:
        if self.classes is None:
            return None
        balanced = self.config.labels == "balanced"
        return sample_labels(self.config.seed, indices, self.classes, balanced)


@torch.inference_mode()
def generate(
    network: DiT,
    objective: Objective,
    seed: int,
    indices: Tensor,
    labels: Tensor | None,
    nfe: int,
    device: torch.device,
) -> Tensor:
    """Samples (B, C, H, W) float32 on the CPU; sample i is a function of (weights, seed, i, label, nfe)."""
    config = network.config
    shape = (config.channels, config.height, config.width)
    noise, *renoise = (sample_noise(seed, indices, shape, draw).to(device) for draw in range(nfe))
    labels = None if labels is None else labels.to(device)
    return objective.sample(network, noise, labels, nfe, renoise).float().cpu()


def as_seen(features: FeatureNetwork | PooledFeatures, samples: Tensor) -> Tensor:
    """What a feature network looks at: images (B, C, H, W) uint8, or the training space itself."""
    return samples if isinstance(features, PooledFeatures) else to_uint8(samples)


def viewable(samples: Tensor) -> Tensor:
    """(B, C, H, W) in the training space -> uint8 images; of latents, their first three channels."""
    if samples.shape[1] not in (1, 3):
        samples = (samples[:, :3] / 3).clamp(-1, 1)
    return to_uint8(samples)


def grid_image(images: Tensor, columns: int) -> np.ndarray[Any, Any]:
    """(N, C, H, W) uint8 -> one picture (H', W', 3); images too small to be seen are enlarged."""
    return image_grid(images, columns=columns, enlarge=max(1, VISIBLE_PIXELS // images.shape[2]))


def feature_network(
    config: EvaluationConfig, info: DatasetInfo, storage: Storage
) -> FeatureNetwork | PooledFeatures:
    """The feature network that `evaluation.features` names."""
    if config.features == "digits-classifier":
        return digits_classifier(storage.features)
    return PooledFeatures(info.shape)


def reference_statistics(
    features: FeatureNetwork | PooledFeatures, info: DatasetInfo, data: str, storage: Storage
) -> FeatureStatistics:
    """Statistics of the training data's features, kept under the project folder by data digest and feature id."""
    path = storage.features / f"reference-{short_digest(info)}-{features.id}.npz"
    if path.exists():
        with np.load(path) as arrays:
            return FeatureStatistics.from_state(dict(arrays))
    count = min(info.samples, REFERENCE_LIMIT)
    batch = min(count, 256)
    loader = ShardLoader(data, batch_size=batch)
    statistics = FeatureStatistics(features.dim)
    for start in range(0, count, batch):
        x0 = next(loader).x0[: count - start]
        statistics.update(features(as_seen(features, x0)).features)
    _save_arrays(path, statistics.state())
    return statistics


def short_digest(info: DatasetInfo) -> str:
    """Enough of the data's digest to tell sets apart in a file name or a tag."""
    return info.digest.rsplit(":", 1)[-1][:16]


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial.npz")
    np.savez(aside, **arrays)
    aside.replace(path)
