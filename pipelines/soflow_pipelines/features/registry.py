"""Feature networks by name. Names are read without torch: a network's module is imported when it is opened.

One of a plugin is registered in the same way, and is then a value of `evaluation.features` and `--features`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from soflow_core.registration import Registry, register

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


class FeatureKind(ABC):
    """A feature network that is opened by its name: a frozen dataclass without settings."""

    name: str
    """Given by `@register`."""
    space: ClassVar[Literal["images", "training"]] = "images"
    """What the network looks at: images, or samples in the training space."""
    named_scores: ClassVar[bool] = True
    """Whether scores on it are called after it, as `eval/kid_NAME_nfe1`, so that they are not taken for those on Inception."""
    width: ClassVar[int | None] = None
    """Number of features, where it is known before the network is opened."""
    gives_patches: ClassVar[bool] = False
    """Whether it also gives features of the parts of an image (`PatchFeatureNetwork`)."""

    @abstractmethod
    def open(self, options: OpeningOptions) -> FeatureNetwork:
        """The network in float32 on the device. Raises FeatureError where it cannot be had."""


FEATURES: Registry[FeatureKind] = Registry("feature network", FeatureKind, "name")  # type: ignore[type-abstract]


@register("inception")
@dataclass(frozen=True)
class InceptionKind(FeatureKind):
    """The Inception network of published FIDs."""

    named_scores = False
    width = 2048

    def open(self, options: OpeningOptions) -> FeatureNetwork:
        from soflow_pipelines.features.inception import open_inception

        return open_inception(options.cache, options.device, options.download)


@register("dinov2")
@dataclass(frozen=True)
class DinoV2Kind(FeatureKind):
    """DINOv2 ViT-L/14."""

    width = 1024
    gives_patches = True

    def open(self, options: OpeningOptions) -> FeatureNetwork:
        from soflow_pipelines.features.dinov2 import open_dinov2

        return open_dinov2(options.cache, options.device, options.download)


@register("clip")
@dataclass(frozen=True)
class ClipKind(FeatureKind):
    """CLIP ViT-B/32's image encoder."""

    width = 512

    def open(self, options: OpeningOptions) -> FeatureNetwork:
        from soflow_pipelines.features.clip import open_clip

        return open_clip(options.cache, options.device, options.download)


@register("digits-classifier")
@dataclass(frozen=True)
class DigitsKind(FeatureKind):
    """A small network trained on the handwritten digits."""

    named_scores = False
    width = 64
    gives_patches = True

    def open(self, options: OpeningOptions) -> FeatureNetwork:
        from soflow_pipelines.features.digits import digits_classifier

        return digits_classifier(options.cache).to(options.device)


@register("pooled")
@dataclass(frozen=True)
class PooledKind(FeatureKind):
    """Block averages of the training space itself, which need no weights."""

    space = "training"
    named_scores = False

    def open(self, options: OpeningOptions) -> FeatureNetwork:
        from soflow_pipelines.features.network import FeatureError
        from soflow_pipelines.features.pooled import PooledFeatures

        if options.shape is None:
            raise FeatureError("pooled features need the shape (C, H, W) of the samples.")
        return PooledFeatures(options.shape)


FEATURE_NAMES = (*FEATURES, f"{FILE}PATH")
"""What comes with the package. A plugin may register more."""


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
        raise FeatureError(
            f"there is no feature network {name!r}; there are {', '.join((*FEATURES, f'{FILE}PATH'))}."
        )
    options = OpeningOptions(
        Path(cache), torch.device(device), download, None if shape is None else tuple(shape)
    )
    return FEATURES[name]().open(options)
