"""Features of clean samples that a network is aligned with in training (`training.alignment`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from soflow_core.alignment import Alignment
from soflow_core.networks import Architecture
from soflow_pipelines.features.network import FeatureNetwork, PatchFeatureNetwork
from soflow_pipelines.images.convert import to_uint8
from soflow_pipelines.shards.info import DatasetInfo
from soflow_platform.config.experiment import Experiment
from soflow_platform.evaluation.feature_networks import feature_network
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.alignment_cost import aligned_block


@dataclass(frozen=True)
class FeatureTargets:
    """Features of clean samples: (B, C, H, W) in the training space -> (B, D), or (B, D, h, w) where the network gives parts."""

    network: FeatureNetwork

    def __call__(self, x0: Tensor) -> Tensor:
        images = to_uint8(x0) if self.network.space == "images" else x0
        if isinstance(self.network, PatchFeatureNetwork):
            return self.network.patch_features(images)
        return self.network(images).features


def alignment_of(
    experiment: Experiment, network: Architecture, info: DatasetInfo, storage: ProjectFolder
) -> Alignment | None:
    """The alignment of a trial with its feature network; None where its weight is 0.

    Raises FeatureError where the feature network cannot be had.
    """
    settings = experiment.training.alignment
    if not settings.active:
        return None
    assert settings.features is not None
    features = feature_network(settings.features, tuple(info.shape), storage)
    return Alignment(
        settings.weight, aligned_block(experiment, network), FeatureTargets(features), features.dim
    )
