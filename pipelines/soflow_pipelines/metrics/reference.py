"""Reference: statistics of the real images that a set of samples is scored against."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from soflow_pipelines.metrics.accumulators import FeatureReservoir, Moments, SpatialMoments
from soflow_pipelines.metrics.fid import GaussianMoments
from soflow_pipelines.metrics.precision_recall import NEIGHBOURS, squared_radii
from soflow_pipelines.metrics.score_statistics import ScoreStatistics
from soflow_pipelines.storage.files import write_bytes

STATE = "state."
"""Prefix of the arrays of `Reference.states` in a file."""


@dataclass(frozen=True)
class Reference:
    """Statistics of a set of real images, of one feature network."""

    name: str
    """Location of the images; a tag of each score."""
    features: str
    """The id of the feature network."""
    resolution: tuple[int, int] | None
    """Height and width of the images, None where it is not known."""
    count: int | None
    moments: GaussianMoments | None = None
    spatial: GaussianMoments | None = None
    samples: NDArray[np.float32] | None = None
    """Features (N, D) of the images, or of a part of them, for KID, precision and recall."""
    radii: NDArray[np.float64] | None = None
    """(N,) `squared_radii` of `samples`, where they were computed ahead of scores."""
    warnings: tuple[str, ...] = ()
    states: Mapping[str, Mapping[str, NDArray]] = field(default_factory=dict)
    """Of accumulators other than these three, by name: their `state`."""

    @classmethod
    def of(cls, statistics: ScoreStatistics, name: str) -> Reference:
        """The statistics of real images, as a reference. Raises ScoreError where an image is missing or came twice."""
        statistics.check_complete()
        moments, spatial = statistics.part(Moments), statistics.part(SpatialMoments)
        reservoir = statistics.part(FeatureReservoir)
        return cls(
            name=name,
            features=statistics.features,
            resolution=statistics.resolution,
            count=statistics.count,
            moments=None if moments is None else moments.statistics.moments(),
            spatial=None if spatial is None or spatial.statistics is None else spatial.statistics.moments(),
            samples=None if reservoir is None else reservoir.reservoir.features,
            warnings=statistics.warnings,
            states={
                name: part.state()
                for name, part in statistics.parts.items()
                if not isinstance(part, Moments | SpatialMoments | FeatureReservoir)
            },
        )

    def manifold(self, device: str | torch.device = "cpu") -> NDArray[np.float64] | None:
        """(N,) `radii`, computed at the first call where they are not there; None without enough samples."""
        if self.radii is None and self.samples is not None and len(self.samples) > NEIGHBOURS:
            object.__setattr__(self, "radii", squared_radii(self.samples, device=device))
        return self.radii

    def save(self, path: Path) -> None:
        """Write an .npz file that is complete or absent."""
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
        if self.radii is not None:
            arrays["radii"] = self.radii
        for name, state in self.states.items():
            arrays |= {f"{STATE}{name}.{key}": value for key, value in state.items()}
        content = io.BytesIO()
        np.savez(content, **arrays)  # type: ignore[arg-type]
        write_bytes(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what `save` wrote."""
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
                radii=arrays.get("radii"),
                warnings=tuple(str(warning) for warning in arrays["warnings"]),
                states=_states(arrays),
            )


def _states(arrays: np.lib.npyio.NpzFile) -> dict[str, dict[str, NDArray]]:
    states: dict[str, dict[str, NDArray]] = {}
    for key in arrays:
        if key.startswith(STATE):
            name, _, array = key.removeprefix(STATE).partition(".")
            states.setdefault(name, {})[array] = arrays[key]
    return states


def _moments(arrays: np.lib.npyio.NpzFile, part: str) -> GaussianMoments | None:
    if f"{part}.mean" not in arrays:
        return None
    return GaussianMoments(
        arrays[f"{part}.mean"], arrays[f"{part}.covariance"], _counted(arrays[f"{part}.count"])
    )


def _counted(count: NDArray) -> int | None:
    return None if int(count) < 0 else int(count)
