"""Feature networks: an image to a vector, to compare sets of images by.

clip          CLIP ViT-B/32
digits        classifier of the real digits
dinov2        DINOv2 ViT-L/14
exported      any network, as a torch.export program
inception     the Inception network of FID
network       interface of a feature network
pooled        block averages, without weights
registry      the networks by name
weight_files  published weight files: found, fetched, read
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soflow_pipelines.features.digits import DigitsClassifier, digits_classifier, held_out
    from soflow_pipelines.features.network import FeatureError, FeatureNetwork, Features
    from soflow_pipelines.features.registry import FEATURE_NAMES, open_features

__all__ = [
    "FEATURE_NAMES",
    "DigitsClassifier",
    "FeatureError",
    "FeatureNetwork",
    "Features",
    "digits_classifier",
    "held_out",
    "open_features",
]

_MODULES = {
    "FEATURE_NAMES": "registry",
    "DigitsClassifier": "digits",
    "FeatureError": "network",
    "FeatureNetwork": "network",
    "Features": "network",
    "digits_classifier": "digits",
    "held_out": "digits",
    "open_features": "registry",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: the names of the networks are read without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
