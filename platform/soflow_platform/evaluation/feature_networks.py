"""soflow_platform.evaluation.feature_networks"""

from __future__ import annotations

import torch

from soflow_pipelines.features import FeatureError, FeatureNetwork, open_features
from soflow_pipelines.features.pooled import PooledFeatures
from soflow_platform.config.evaluation import POOLED
from soflow_platform.errors import UserError
from soflow_platform.storage.project import ProjectFolder


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def feature_network(name: str, shape: tuple[int, ...], storage: ProjectFolder) -> FeatureNetwork:
    """The feature network of this name for samples (C, H, W). Raises UserError where it cannot be had."""
    if name == POOLED:
        return PooledFeatures(shape)
    try:
        return open_features(name, storage.features, _device())
    except FeatureError as error:
        raise UserError(str(error)) from error
