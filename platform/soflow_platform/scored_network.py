"""A trained network as something to be scored: what decides its images, and what is to be gathered of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from soflow_core.networks import DiTConfig
from soflow_core.objectives import Objective
from soflow_pipelines.features.weights import file_digest
from soflow_platform.errors import UserError
from soflow_platform.generator import read_weights
from soflow_platform.measurement import GeneratedImages, LabelMode, Measurement
from soflow_platform.network_evaluations import sampling_evaluations
from soflow_platform.sampling import sampling_facts, with_sampling
from soflow_platform.yardstick import Yardstick

WITHOUT_LABELS = "none"


@dataclass(frozen=True)
class ScoredNetwork:
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
    def open(cls, path: Path, sampling: Mapping[str, Any]) -> ScoredNetwork:
        """Raises UserError where the file holds no generator, or the method has no such setting."""
        weights, trained = read_weights(path)
        objective = with_sampling(trained, sampling)
        config = weights.network_config
        return cls(path, file_digest(path), config, weights.data, trained, objective, dict(sampling))

    def sampled(self, sampling: Mapping[str, Any]) -> ScoredNetwork:
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
        yardstick: Yardstick,
        steps: int,
        labels: LabelMode,
        seed: int,
        count: int,
        autoencoder: str | None = None,
    ) -> Measurement:
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
        return Measurement(images, yardstick.name, yardstick.features.id, yardstick.metrics, self.shape)
