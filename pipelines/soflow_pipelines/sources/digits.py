"""Real data that a dependency ships: scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np

from soflow_pipelines.sources.source import LabelledImages


def load_digits() -> LabelledImages:
    """The 1,797 handwritten digits (N, 1, 8, 8) of scikit-learn, 17 grey levels spread over 0 to 255."""
    from sklearn.datasets import load_digits as read_digits

    digits = read_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    names = tuple(str(name) for name in digits.target_names)
    return LabelledImages(images, digits.target.astype(np.int64), names)
