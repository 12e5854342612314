"""A weights file and the sampler settings under which its images are scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from soflow_core.networks import Architecture
from soflow_core.nfe import sampling_evaluations
from soflow_core.objectives import Objective
from soflow_pipelines.references.statistics_job import StatisticsJob
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.storage.files import sha256
from soflow_platform.config.sampling_settings import with_sampling
from soflow_platform.errors import UserError
from soflow_platform.evaluation.image_sources import GeneratedImages, LabelMode
from soflow_platform.evaluation.protocol import ScoringProtocol
from soflow_platform.generation.generator import read_weights
from soflow_platform.generation.sampling import sampling_facts

WITHOUT_LABELS = "none"


@dataclass(frozen=True)
class SampleSettings:
    """Which samples of a network are scored."""

    steps: int
    labels: LabelMode
    seed: int
    count: int


@dataclass(frozen=True)
class ModelUnderTest:
    """Header of a weights file, and its method with the sampler settings that are scored. The weights stay in the file."""

    path: Path
    digest: str
    """SHA-256 of the file."""
    config: Architecture
    data: DatasetInfo | None
    """Description of the training data; None where the weights name none."""
    trained: Objective
    """The method as it was trained."""
    objective: Objective
    """The method as it is sampled."""
    sampling: dict[str, Any]
    """Sampler settings that differ from those of training."""

    @classmethod
    def open(cls, path: Path, sampling: Mapping[str, Any]) -> ModelUnderTest:
        """Read the header of a weights file. Raises UserError where it holds no generator, or the method has no such setting."""
        weights, trained = read_weights(path)
        objective = with_sampling(trained, sampling)
        config = weights.network_config
        return cls(
            path,
            sha256(path),
            config,
            DatasetInfo.from_facts(weights.data),
            trained,
            objective,
            dict(sampling),
        )

    def sampled(self, sampling: Mapping[str, Any]) -> ModelUnderTest:
        """The same weights with other sampler settings."""
        return replace(self, objective=with_sampling(self.trained, sampling), sampling=dict(sampling))

    @property
    def conditional(self) -> bool:
        """Whether the network takes labels."""
        return self.config.classes is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its samples."""
        return self.config.channels, self.config.height, self.config.width

    def nfe(self, steps: int) -> int:
        """Function evaluations in `steps` sampling steps. Raises UserError where the sampler cannot take so many."""
        try:
            return sampling_evaluations(self.objective, steps, self.conditional)
        except ValueError as error:
            raise UserError(f"{steps} steps of {self.objective.method}: {error}.") from None

    def tags(self, samples: SampleSettings) -> dict[str, str]:
        """Every setting that decides the samples, as tags."""
        return {
            "weights": self.digest[:16],
            "method": self.objective.method,
            "steps": str(samples.steps),
            "nfe": str(self.nfe(samples.steps)),
            **sampling_facts(self.objective),
            "labels": samples.labels if self.conditional else WITHOUT_LABELS,
            "seed": str(samples.seed),
            "samples": str(samples.count),
        }

    def statistics_job(
        self, samples: SampleSettings, protocol: ScoringProtocol, autoencoder: str | None = None
    ) -> StatisticsJob:
        """The statistics that the protocol needs of these samples. `autoencoder` replaces the one that made the latents."""
        images = GeneratedImages(
            str(self.path),
            self.digest,
            samples.steps,
            samples.seed,
            samples.labels,
            samples.count,
            self.sampling,
            autoencoder,
            decode_latents=protocol.features.space == "images",
        )
        return StatisticsJob(images, protocol.name, protocol.features.id, protocol.metrics, self.shape)
