"""A trained network as something to be scored: what decides its images, and what is to be gathered of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from soflow_core.networks import DiTConfig
from soflow_core.nfe import sampling_evaluations
from soflow_core.objectives import Objective
from soflow_pipelines.storage.files import sha256
from soflow_platform.errors import UserError
from soflow_platform.evaluation.image_sources import GeneratedImages, LabelMode
from soflow_platform.evaluation.protocol import ScoringProtocol
from soflow_platform.evaluation.statistics import StatisticsJob
from soflow_platform.generation.generator import read_weights
from soflow_platform.generation.sampling import sampling_facts, with_sampling

WITHOUT_LABELS = "none"


@dataclass(frozen=True)
class ModelUnderTest:
    """What a file of weights says of them, and the method as it is sampled. The weights stay where they are."""

    path: Path
    digest: str
    config: DiTConfig
    data: dict[str, Any]
    """What is known of the data it was trained on."""
    trained: Objective
    objective: Objective
    sampling: dict[str, Any]
    """Settings of the sampler other than those of training."""

    @classmethod
    def open(cls, path: Path, sampling: Mapping[str, Any]) -> ModelUnderTest:
        """Raises UserError where the file holds no generator, or the method has no such setting."""
        weights, trained = read_weights(path)
        objective = with_sampling(trained, sampling)
        config = weights.network_config
        return cls(path, sha256(path), config, weights.data, trained, objective, dict(sampling))

    def sampled(self, sampling: Mapping[str, Any]) -> ModelUnderTest:
        """The same weights, sampled in another way."""
        return replace(self, objective=with_sampling(self.trained, sampling), sampling=dict(sampling))

    @property
    def conditional(self) -> bool:
        """Whether it takes labels."""
        return self.config.classes is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its samples."""
        return self.config.channels, self.config.height, self.config.width

    def nfe(self, steps: int) -> int:
        """Function evaluations in `steps` steps. Raises UserError where the sampler does not take so many."""
        try:
            return sampling_evaluations(self.objective, steps, self.conditional)
        except ValueError as error:
            raise UserError(f"{steps} steps of {self.objective.method}: {error}.") from None

    def facts(self, steps: int, labels: LabelMode, seed: int, count: int) -> dict[str, str]:
        """Everything that decides its images, as tags."""
        return {
            "weights": self.digest[:16],
            "method": self.objective.method,
            "steps": str(steps),
            "nfe": str(self.nfe(steps)),
            **sampling_facts(self.objective),
            "labels": labels if self.conditional else WITHOUT_LABELS,
            "seed": str(seed),
            "samples": str(count),
        }

    def measurement(
        self,
        yardstick: ScoringProtocol,
        steps: int,
        labels: LabelMode,
        seed: int,
        count: int,
        autoencoder: str | None = None,
    ) -> StatisticsJob:
        """What is to be gathered of its images for this yardstick."""
        images = GeneratedImages(
            str(self.path),
            self.digest,
            steps,
            seed,
            labels,
            count,
            self.sampling,
            autoencoder,
            decodes=yardstick.features.space == "images",
        )
        return StatisticsJob(images, yardstick.name, yardstick.features.id, yardstick.metrics, self.shape)
