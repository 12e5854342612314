"""Feature networks by name. Names are read without torch: a network's module is imported when it is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from soflow_pipelines.features.network import FeatureNetwork

FILE = "file:"
"""Prefix of the path of an exported network."""


@dataclass(frozen=True)
class OpeningOptions:
    """Options with which a feature network is opened; each network uses those that it needs."""

    cache: Path
    """Folder of weight files."""
    device: torch.device
    download: bool
    """Whether a missing weight file is fetched."""
    shape: tuple[int, ...] | None
    """(C, H, W) of samples in the training space."""


def _inception(options: OpeningOptions) -> FeatureNetwork:
    from soflow_pipelines.features.inception import open_inception

    return open_inception(options.cache, options.device, options.download)


def _dinov2(options: OpeningOptions) -> FeatureNetwork:
    from soflow_pipelines.features.dinov2 import open_dinov2

    return open_dinov2(options.cache, options.device, options.download)


def _clip(options: OpeningOptions) -> FeatureNetwork:
    from soflow_pipelines.features.clip import open_clip

    return open_clip(options.cache, options.device, options.download)


def _digits_classifier(options: OpeningOptions) -> FeatureNetwork:
    from soflow_pipelines.features.digits import digits_classifier

    return digits_classifier(options.cache).to(options.device)


def _pooled(options: OpeningOptions) -> FeatureNetwork:
    from soflow_pipelines.features.network import FeatureError
    from soflow_pipelines.features.pooled import PooledFeatures

    if options.shape is None:
        raise FeatureError("pooled features need the shape (C, H, W) of the samples.")
    return PooledFeatures(options.shape)


FEATURES: dict[str, Callable[[OpeningOptions], FeatureNetwork]] = {
    "inception": _inception,
    "dinov2": _dinov2,
    "clip": _clip,
    "digits-classifier": _digits_classifier,
    "pooled": _pooled,
}
"""Opens each feature network that has a name; `file:PATH` opens an exported one."""

FEATURE_NAMES = (*FEATURES, f"{FILE}PATH")


def open_features(
    name: str,
    cache: Path,
    device: str | torch.device = "cpu",
    *,
    download: bool = True,
    shape: Sequence[int] | None = None,
) -> FeatureNetwork:
    """The feature network of this name, in float32 on `device`.

    `inception`, `dinov2` and `clip` need a weight file: the one that SOFLOW_INCEPTION_WEIGHTS, SOFLOW_DINOV2_WEIGHTS or
    SOFLOW_CLIP_WEIGHTS names, or the published file in `cache` or in torch hub's cache. Where there is none it is fetched into
    `cache` from where it is published, unless `download` is False. `file:PATH` is a torch.export program with a JSON file of the
    same name beside it. `pooled` needs the `shape` (C, H, W) of the samples. Raises FeatureError where the network cannot be had.
    """
    import torch

    from soflow_pipelines.features.network import FeatureError

    if name.startswith(FILE):
        from soflow_pipelines.features.exported import open_exported

        return open_exported(Path(name.removeprefix(FILE)).expanduser(), torch.device(device))
    if name not in FEATURES:
        raise FeatureError(f"there is no feature network {name!r}; there are {', '.join(FEATURE_NAMES)}.")
    options = OpeningOptions(
        Path(cache), torch.device(device), download, None if shape is None else tuple(shape)
    )
    return FEATURES[name](options)
