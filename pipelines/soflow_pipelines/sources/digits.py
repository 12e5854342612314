"""scikit-learn's handwritten digits: a real data set that comes with a dependency."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import numpy as np

from soflow_core.registration import register
from soflow_pipelines.sources.source import (
    ArraySource,
    Expected,
    LabelledImages,
    Source,
    SourceKind,
    SourceOptions,
)

FILE = "sklearn/datasets/data/digits.csv.gz"
"""In the installed scikit-learn, whose import takes two seconds: a row of 64 grey levels and a label for each digit."""


@register("digits")
@dataclass(frozen=True)
class Digits(SourceKind):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels."""

    expected = Expected((1, 8, 8), 10)

    def open(self, path: Path, options: SourceOptions) -> Source:
        del path, options
        return ArraySource("digits", load_digits())


def load_digits() -> LabelledImages:
    """The 1,797 digits (N, 1, 8, 8), their 17 grey levels scaled to 0 to 255."""
    with gzip.open(Path(str(distribution("scikit-learn").locate_file(FILE))), "rt", encoding="ascii") as file:
        rows = np.array([[float(value) for value in row] for row in csv.reader(file)])
    images = np.rint(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    return LabelledImages(images, rows[:, -1].astype(np.int64), tuple(map(str, range(10))))
