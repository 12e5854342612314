"""The real images that scores are taken against, as statistics."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from soflow_pipelines.metrics.accumulator import ScoreStatistics
from soflow_pipelines.metrics.fid import GaussianMoments
from soflow_pipelines.storage.files import write_bytes


@dataclass(frozen=True)
class Reference:
    """Statistics of a set of real images, of one feature network."""

    name: str
    """Where the images are from, in words that go with each number."""
    features: str
    """The id of the feature network."""
    resolution: tuple[int, int] | None
    """Height and width of the images, None where nobody wrote it down."""
    count: int | None
    moments: GaussianMoments | None = None
    spatial: GaussianMoments | None = None
    samples: NDArray[np.float32] | None = None
    """Features (N, D) of the images, or of a part of them, for KID, precision and recall."""
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, statistics: ScoreStatistics, name: str) -> Reference:
        """The statistics of real images, as a reference. ScoreError where an image is missing or came twice."""
        statistics.check_complete()
        return cls(
            name=name,
            features=statistics.features,
            resolution=statistics.resolution,
            count=statistics.count,
            moments=None if statistics.moments is None else statistics.moments.moments(),
            spatial=None if statistics.spatial is None else statistics.spatial.moments(),
            samples=None if statistics.reservoir is None else statistics.reservoir.features,
            warnings=statistics.warnings,
        )

    def save(self, path: Path) -> None:
        """Writes an .npz file that is complete or absent."""
        arrays: dict[str, NDArray] = {
            "name": np.asarray(self.name),
            "features": np.asarray(self.features),
            "resolution": np.asarray(self.resolution or (0, 0)),
            "count": np.asarray(-1 if self.count is None else self.count),
            "warnings": np.asarray(self.warnings, dtype=np.str_),
        }
        for part in ("moments", "spatial"):
            moments: GaussianMoments | None = getattr(self, part)
            if moments is not None:
                arrays[f"{part}.mean"], arrays[f"{part}.covariance"] = moments.mean, moments.covariance
                arrays[f"{part}.count"] = np.asarray(-1 if moments.count is None else moments.count)
        if self.samples is not None:
            arrays["samples"] = self.samples
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        write_bytes(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Reference:
        with np.load(path) as arrays:
            height, width = (int(side) for side in arrays["resolution"])
            return cls(
                name=str(arrays["name"]),
                features=str(arrays["features"]),
                resolution=(height, width) if height else None,
                count=_counted(arrays["count"]),
                moments=_moments(arrays, "moments"),
                spatial=_moments(arrays, "spatial"),
                samples=arrays.get("samples"),
                warnings=tuple(str(warning) for warning in arrays["warnings"]),
            )


def _moments(arrays: np.lib.npyio.NpzFile, part: str) -> GaussianMoments | None:
    if f"{part}.mean" not in arrays:
        return None
    return GaussianMoments(
        arrays[f"{part}.mean"], arrays[f"{part}.covariance"], _counted(arrays[f"{part}.count"])
    )


def _counted(count: NDArray) -> int | None:
    return None if int(count) < 0 else int(count)
