"""Feature networks by name."""

from __future__ import annotations

from pathlib import Path

import torch

from soflow_pipelines.features.digits import digits_classifier
from soflow_pipelines.features.network import FeatureError, FeatureNetwork

FEATURE_NAMES = ("inception", "dinov2", "clip", "digits-classifier", "file:PATH")


def open_features(
    name: str, cache: Path, device: str | torch.device = "cpu", *, download: bool = True
) -> FeatureNetwork:
    """The feature network of this name, in float32 on `device`.

    `inception`, `dinov2` and `clip` need a weight file: the one that SOFLOW_INCEPTION_WEIGHTS, SOFLOW_DINOV2_WEIGHTS or
    SOFLOW_CLIP_WEIGHTS names, or the published file in `cache` or in torch hub's cache. Where there is none it is fetched into
    `cache` from where torch-fidelity fetches it, unless `download` is False. `file:PATH` is a torch.export program with PATH.json
    beside it. FeatureError says what is missing and where to put it.
    """
    if name == "digits-classifier":
        return digits_classifier(cache).to(device)
    raise FeatureError(
        f"there is no feature network {name!r}; there are {', '.join(FEATURE_NAMES)} (and `pooled`, which needs a shape)."
    )
