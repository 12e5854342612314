"""Opens the feature network of an evaluation from the project folder's weight files."""

from __future__ import annotations

import torch

from soflow_pipelines.features.network import FeatureNetwork
from soflow_pipelines.features.registry import open_features
from soflow_platform.storage.project import ProjectFolder


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU, as torch's device name."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def feature_network(name: str, shape: tuple[int, ...], storage: ProjectFolder) -> FeatureNetwork:
    """The feature network of this name for samples (C, H, W). Raises FeatureError where it cannot be had."""
    return open_features(name, storage.features, best_device(), shape=shape)
