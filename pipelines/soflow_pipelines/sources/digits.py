"""scikit-learn's handwritten digits: a real data set that comes with a dependency."""

from __future__ import annotations

import numpy as np

from soflow_pipelines.sources.source import LabelledImages


def load_digits() -> LabelledImages:
    """The 1,797 digits (N, 1, 8, 8), their 17 grey levels scaled to 0 to 255."""
    from sklearn.datasets import load_digits as read_digits

    digits = read_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    names = tuple(str(name) for name in digits.target_names)
    return LabelledImages(images, digits.target.astype(np.int64), names)
