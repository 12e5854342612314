"""Feature networks by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from soflow_pipelines.features.clip import open_clip
from soflow_pipelines.features.digits import digits_classifier
from soflow_pipelines.features.dinov2 import open_dinov2
from soflow_pipelines.features.exported import open_exported
from soflow_pipelines.features.inception import open_inception
from soflow_pipelines.features.network import FeatureError, FeatureNetwork

FEATURE_NAMES = ("inception", "dinov2", "clip", "digits-classifier", "file:PATH")

_PUBLISHED: dict[str, Callable[[Path, torch.device, bool], FeatureNetwork]] = {
    "inception": open_inception,
    "dinov2": open_dinov2,
    "clip": open_clip,
}


def open_features(
    name: str, cache: Path, device: str | torch.device = "cpu", *, download: bool = True
) -> FeatureNetwork:
    """The feature network of this name, in float32 on `device`.

    `inception`, `dinov2` and `clip` need a weight file: the one that SOFLOW_INCEPTION_WEIGHTS, SOFLOW_DINOV2_WEIGHTS or
    SOFLOW_CLIP_WEIGHTS names, or the published file in `cache` or in torch hub's cache. Where there is none it is fetched into
    `cache` from where it is published, unless `download` is False. `file:PATH` is a torch.export program with a JSON file of the
    same name beside it. FeatureError says what is missing and where to put it.
    """
    if name == "digits-classifier":
        return digits_classifier(cache).to(device)
    if name.startswith("file:"):
        return open_exported(Path(name.removeprefix("file:")).expanduser(), torch.device(device))
    if name in _PUBLISHED:
        return _PUBLISHED[name](Path(cache), torch.device(device), download)
    raise FeatureError(
        f"there is no feature network {name!r}; there are {', '.join(FEATURE_NAMES)} (and `pooled`, which needs a shape)."
    )
