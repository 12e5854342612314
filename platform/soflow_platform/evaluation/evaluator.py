"""Evaluator: scores samples during training by Fréchet distance and label agreement, at given numbers of function evaluations.

Sample i is a function of (evaluation seed, i) and the weights alone, so that evaluating changes no random number of the training,
and every evaluation of a sweep sees the same noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soflow_core.nfe import steps_for
from soflow_core.objectives import Objective
from soflow_core.samplers.noise import sample_labels
from soflow_core.sampling_networks import SamplingNetwork
from soflow_pipelines.features.network import FeatureNetwork
from soflow_pipelines.images.codec import Autoencoder, AutoencoderError
from soflow_pipelines.images.convert import to_uint8
from soflow_pipelines.images.encode import image_grid
from soflow_pipelines.metrics import EVALUATOR, METRICS, Reference, ScoreError, ScoreStatistics, scores
from soflow_pipelines.metrics.registry import select_metrics
from soflow_pipelines.references.latent_decoder import open_decoder
from soflow_pipelines.references.reference_store import (
    ReferenceLocation,
    ReferenceStore,
    reference_flags,
)
from soflow_pipelines.references.statistics_job import ComputeStatistics, LocalStatistics
from soflow_pipelines.shards.info import DatasetInfo
from soflow_platform.config.evaluation import DIGITS, POOLED, EvaluationConfig
from soflow_platform.errors import UserError
from soflow_platform.evaluation.feature_networks import best_device, feature_network
from soflow_platform.evaluation.ranks import Ranks, SingleProcess
from soflow_platform.generation.decoding import autoencoder_tag, decode_samples
from soflow_platform.generation.sampling import generate
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import FLAGS_TAG

QUICKLY_POOLED = 50_000
"""Number of samples up to which one process computes the statistics of `pooled` features in seconds."""
VISIBLE_PIXELS = 48
"""Images in a grid are enlarged to at least this many pixels a side."""
SINGLE_PROCESS = SingleProcess()


class Interrupted(Exception):
    """Raised where an evaluation is asked to stop before its end. Its results are discarded."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and one sample grid (H, W, 3) uint8 for each number of evaluations."""

    metrics: dict[str, float]
    grids: dict[str, np.ndarray[Any, Any]]
    flags: list[str] = field(default_factory=list)
    """Sentences on why a metric is refused (and nan), or not comparable with others of its name, and why there are no grids."""


@dataclass(frozen=True)
class Comparison:
    """Features that samples are described by, and the real images that they are compared with."""

    features: FeatureNetwork
    reference: Reference
    kinds: dict[str, str]
    """Name in `eval/NAME_nfeN` -> the metric that it is."""
    decoder: Autoencoder | None = None
    """Decodes latents for features of images."""

    def values(self, states: list[dict[str, Any]]) -> tuple[dict[str, float], list[str]]:
        """Metrics and flags of the statistics of all ranks."""
        whole = ScoreStatistics.from_state(states[0])
        for state in states[1:]:
            whole.merge(ScoreStatistics.from_state(state))
        result = scores(whole, self.reference)
        return result.values, result.flags


@dataclass(frozen=True)
class Evaluator:
    """Scores the samples of networks that are trained on one data set."""

    config: EvaluationConfig
    info: DatasetInfo
    classes: int | None
    """Number of classes; None for unconditional training."""
    features: FeatureNetwork
    reference: Reference
    decoder: Autoencoder | None = None
    """Decodes latents for features of images."""
    pooled: Comparison | None = None
    """What the same samples are scored by besides."""

    @classmethod
    def open(
        cls,
        config: EvaluationConfig,
        info: DatasetInfo,
        data: str,
        conditional: bool,
        storage: ProjectFolder,
        compute: ComputeStatistics | None = None,
    ) -> Evaluator:
        """Load the feature network and the reference statistics, which are computed and kept where they are missing.

        `compute` computes the statistics on a cluster; without it, and where they take seconds, this process does. Raises InputError
        where the feature network or the autoencoder cannot be loaded.
        """
        features = feature_network(config.features, info.shape, storage)
        decoder = None
        if features.space == "images":
            decoder = open_decoder(info, config.autoencoder, best_device())
        classes = info.classes if conditional else None
        try:
            metrics = select_metrics(config.metric_kinds(classes is not None).values(), features)
        except ScoreError as error:
            raise UserError(f"evaluation.metrics: {error}") from None
        compared = tuple(metric for metric in metrics if METRICS[metric].compares)
        store = _reference_store(features, config.features, compared, info, storage, compute)
        try:
            if config.reference is None:
                resolved = store.of_training_data(info, data, config.autoencoder)
            else:
                factor = decoder.facts.factor if decoder else 1
                size = info.shape[1] * factor, info.shape[2] * factor
                resolved = store.resolve(ReferenceLocation(config.reference, config.autoencoder), size)
        except ScoreError as error:
            raise UserError(f"evaluation.features {config.features}: {error}") from error
        pooled = _pooled(info, data, storage, compute) if config.also_pooled else None
        return cls(config, info, classes, features, resolved.reference, decoder, pooled)

    def evaluate(
        self,
        network: SamplingNetwork,
        objective: Objective,
        device: torch.device,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> Evaluation:
        """Score `network`, together with the other ranks; all of them return the same metrics, and rank 0 the sample grids.

        A metric that is refused, because a sample is not finite, is nan on every rank. Raises Interrupted on every rank where
        `ranks.should_stop()`, which is called before every batch, returns True.
        """
        metrics: dict[str, float] = {}
        flags: list[str] = []
        for nfe in self.config.nfe:
            parts = ranks.gather([self._part(network, objective, nfe, device, ranks)])
            refused = [part["refused"] for part in parts if "refused" in part][:1]
            for number, comparison in enumerate(self._comparisons):
                values, sentences = (
                    ({}, refused)
                    if refused
                    else comparison.values([part["states"][number] for part in parts])
                )
                # A refusal concerns this number; the other sentences concern all.
                flags += sentences if values else [f"{sentence} (nfe {nfe})" for sentence in sentences]
                for name, kind in comparison.kinds.items():
                    metrics[f"eval/{name}_nfe{nfe}"] = values.get(kind, math.nan)
        grids = {}
        if ranks.rank == 0:
            grids = self.grids(network, objective, device)
            flags += [] if self.without_grids is None else [self.without_grids]
        return Evaluation(metrics, grids, list(dict.fromkeys(flags)))

    def _part(
        self, network: SamplingNetwork, objective: Objective, nfe: int, device: torch.device, ranks: Ranks
    ) -> dict[str, Any]:
        """Statistics of this rank's batches as arrays, or the sentence that refuses a sample."""
        statistics = [
            ScoreStatistics(each.features, each.kinds.values(), samples=self.config.samples)
            for each in self._comparisons
        ]
        steps = steps_for(objective, nfe, self.classes is not None)
        refused = None
        for indices in self._batches(ranks.rank, ranks.world):
            if ranks.should_stop():
                raise Interrupted
            if refused or indices is None:
                continue
            labels = self._labels(indices)
            samples = generate(network, objective, self.config.seed, indices, labels, steps, device)
            try:
                for each, comparison in zip(statistics, self._comparisons, strict=True):
                    each.update(indices, decode_samples(samples, comparison.decoder), labels)
            except ScoreError as error:
                refused = str(error)
        return {"refused": refused} if refused else {"states": [each.state() for each in statistics]}

    @property
    def _comparisons(self) -> list[Comparison]:
        first = Comparison(self.features, self.reference, self._metric_kinds(), self.decoder)
        return [first] if self.pooled is None else [first, self.pooled]

    def grids(
        self, network: SamplingNetwork, objective: Objective, device: torch.device
    ) -> dict[str, np.ndarray[Any, Any]]:
        """One sample grid for each number of evaluations, by the name it is logged under; none of latents that cannot be decoded."""
        if self.without_grids is not None:
            return {}
        return {f"samples/nfe{nfe}": self.grid(network, objective, nfe, device) for nfe in self.config.nfe}

    def grid(
        self, network: SamplingNetwork, objective: Objective, nfe: int, device: torch.device
    ) -> np.ndarray[Any, Any]:
        """A square of samples, one class to a row, from noise that no scored sample uses."""
        side = self.config.grid
        indices = torch.arange(side * side) + (1 << 40)
        labels = None
        if self.classes is not None:
            labels = (torch.arange(side) * self.classes // side).repeat_interleave(side)
        steps = steps_for(objective, nfe, self.classes is not None)
        samples = generate(network, objective, self.config.seed, indices, labels, steps, device)
        decoder, _ = self._grid_decoder
        return grid_image(to_uint8(decode_samples(samples, decoder)), columns=side)

    @property
    def without_grids(self) -> str | None:
        """Why there are no sample grids, as a sentence; None where there are."""
        return self._grid_decoder[1]

    @functools.cached_property
    def _grid_decoder(self) -> tuple[Autoencoder | None, str | None]:
        """What decodes sample grids, and a sentence where it is needed and cannot be had.

        The hub is not asked, because a machine without network would wait for it.
        """
        if self.decoder is not None or self.info.kind != "latents":
            return self.decoder, None
        try:
            return open_decoder(self.info, self.config.autoencoder, best_device(), download=False), None
        except AutoencoderError as error:
            reason = str(error)
            if self.config.autoencoder is None:
                reason = (
                    f"the autoencoder {self.info.autoencoder} (weights {self.info.autoencoder_digest}) that made the latents is not "
                    "on this machine; name its folder with --set evaluation.autoencoder=FOLDER."
                )
            return None, f"no sample grids: {reason}"

    def tags(self) -> dict[str, str]:
        """Every setting besides the weights that can change the scores, as tags."""
        reference = self.config.reference or self.info.digest.rsplit(":", 1)[-1][:16]
        tags = {
            "eval.evaluator": EVALUATOR,
            "eval.features": self.features.id,
            "eval.reference": f"{reference} ({self.reference.count} samples)",
            "eval.samples": str(self.config.samples),
            "eval.nfe": ",".join(map(str, self.config.nfe)),
            "eval.labels": self.config.labels if self.classes is not None else "none",
            "eval.seed": str(self.config.seed),
        }
        if self.decoder is not None:
            tags["eval.autoencoder"] = autoencoder_tag(self.decoder.facts)
        flags = [*self.flags(), *([] if self.without_grids is None else [self.without_grids])]
        return tags | ({FLAGS_TAG: " ".join(flags)} if flags else {})

    def flags(self) -> list[str]:
        """Flags that hold for every score of this evaluator, whatever the samples."""
        # A reference of its own has images that no autoencoder has touched.
        decoded = reference_flags(self.info, self.features) if self.config.reference is None else []
        flags = [*self.features.warnings, *decoded]
        if self.config.samples < self.features.dim:
            flags.append(
                f"{self.config.samples} samples in {self.features.dim} features: the covariance is singular, and the distance compares "
                "with others of as many samples alone."
            )
        return flags

    def _metric_kinds(self) -> dict[str, str]:
        return self.config.metric_kinds(self.classes is not None)

    def _batches(self, rank: int, world: int) -> Iterator[Tensor | None]:
        """This rank's batches. Every rank gets equally many: None fills up those of a rank that has fewer."""
        batches = torch.arange(self.config.samples).split(self.config.batch)
        for first in range(0, len(batches), world):
            yield batches[first + rank] if first + rank < len(batches) else None

    def _labels(self, indices: Tensor) -> Tensor | None:
        if self.classes is None:
            return None
        balanced = self.config.labels == "balanced"
        return sample_labels(self.config.seed, indices, self.classes, balanced)


def _reference_store(
    features: FeatureNetwork,
    name: str,
    metrics: tuple[str, ...],
    info: DatasetInfo,
    storage: ProjectFolder,
    compute: ComputeStatistics | None,
) -> ReferenceStore:
    """The store of reference statistics; those that take seconds are computed in this process."""
    quickly = name == POOLED and info.samples <= QUICKLY_POOLED
    local = compute is None or name == DIGITS or quickly
    return ReferenceStore(
        features,
        name,
        metrics,
        storage.features,
        LocalStatistics(features, best_device()) if local else compute,
    )


def _pooled(
    info: DatasetInfo, data: str, storage: ProjectFolder, compute: ComputeStatistics | None
) -> Comparison:
    """The comparison on `pooled` features with the training data."""
    features = feature_network(POOLED, info.shape, storage)
    store = _reference_store(features, POOLED, ("fd",), info, storage, compute)
    return Comparison(features, store.of_training_data(info, data).reference, {"fd": "fd"})


def grid_image(images: Tensor, columns: int) -> np.ndarray[Any, Any]:
    """(N, C, H, W) uint8 -> one picture (H', W', 3); images too small to be seen are enlarged."""
    return image_grid(images, columns=columns, enlarge=max(1, VISIBLE_PIXELS // images.shape[2]))
