"""Networks that describe an image by a vector, to compare sets of images by."""

from soflow_pipelines.features.digits import DigitsClassifier, digits_classifier, held_out
from soflow_pipelines.features.network import FeatureError, FeatureNetwork, Features
from soflow_pipelines.features.opening import FEATURE_NAMES, open_features

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
