"""HDF5 files of latents, as the official SoFlow code prepares them, as a source that needs no encoding.

Such a file holds `latents` (N, 2C, h, w), posterior means and then standard deviations, unscaled, and `labels` (N,).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from soflow_core.failures import printable, summarize
from soflow_pipelines.images.decode import ImageError
from soflow_pipelines.images.limits import DEFAULT_LIMITS, ImageLimits
from soflow_pipelines.shards.schema import MAX_CLASSES
from soflow_pipelines.sources.source import OpenedPerThread, SourceError, listing_digest

LATENTS, LABELS = "latents", "labels"
FEW_BYTES = 2**20
"""Bytes of a data set that is always read."""


@runtime_checkable
class EncodedSource(Protocol):
    """A source whose samples are latents already."""

    moments_shape: tuple[int, int, int]
    """(2C, h, w) of a sample: means, then standard deviations."""

    def moments(self, item: int) -> NDArray[np.float32]:
        """A sample as an autoencoder encodes it, unscaled. Raises ImageError with its name where it cannot be used."""


class Hdf5Latents(OpenedPerThread):
    """Latents of an HDF5 file. Raises SourceError where it is damaged, or holds no such latents.

    Each thread opens the file for itself, and data that lie in other files are refused.
    """

    channels = 3
    ignored = 0
    resolution: int | None = None
    class_names: tuple[str, ...] = ()
    block_ends: NDArray[np.int64] | None = None

    def __init__(
        self, path: Path, name: str, unlabelled: bool = False, limits: ImageLimits = DEFAULT_LIMITS
    ) -> None:
        self.name = name
        self._limits = limits
        self._path = str(path)
        super().__init__()
        latents = self._dataset(LATENTS)
        if latents is None:
            raise SourceError(f"{path} has no data set `{LATENTS}`: only HDF5 files of latents are read.")
        if latents.ndim != 4 or latents.dtype.kind != "f" or latents.shape[1] % 2 or not all(latents.shape):
            raise SourceError(
                f"{path}: `{LATENTS}` is {latents.dtype} {tuple(latents.shape)}, it must be floating-point (N, 2C, h, w): means, then "
                "standard deviations."
            )
        self._count, *shape = (int(side) for side in latents.shape)
        self.moments_shape = (shape[0], shape[1], shape[2])
        self.labels: NDArray[np.int64] | None = None if unlabelled else self._read_labels()
        self.label_origin = None if self.labels is None else f"`{LABELS}`"
        if self.labels is not None:
            self.class_names = tuple(str(label) for label in range(int(self.labels.max()) + 1))
        listed = None if self.labels is None else self.labels.tolist()
        self.digest = listing_digest([path.stat().st_size, self._count, self.moments_shape, listed])

    def __len__(self) -> int:
        return self._count

    def item_name(self, item: int) -> str:
        """The row of a sample, for messages."""
        return f"{self.name}[{item}]"

    def image(self, item: int) -> Image.Image:
        """Raises ImageError: there are no images in such a file."""
        raise ImageError(f"{self.item_name(item)} is a latent and no image.")

    def moments(self, item: int) -> NDArray[np.float32]:
        """A sample (2C, h, w). Raises ImageError for one that is not finite, or whose standard deviations are negative."""
        try:
            found = np.asarray(self._dataset(LATENTS)[item], np.float32)
        except (OSError, RuntimeError, ValueError) as error:
            raise ImageError(f"{self.item_name(item)}: damaged ({printable(summarize(error))}).") from error
        if not np.isfinite(found).all():
            raise ImageError(f"{self.item_name(item)}: not finite.")
        if (found[len(found) // 2 :] < 0).any():
            raise ImageError(
                f"{self.item_name(item)}: negative numbers where the standard deviations are due; logarithms of variances are none."
            )
        return found

    def _dataset(self, name: str) -> Any:
        """A data set of the file, opened once in each thread; None where there is none."""
        opened: dict[str, Any] = self._local.__dict__.setdefault("datasets", {})
        if name not in opened:
            # The checks look at every piece that it is stored in: for each sample that would take longer than reading it.
            opened[name] = self._checked_dataset(name)
        return opened[name]

    def _checked_dataset(self, name: str) -> Any:
        """A data set of the file; None where there is none. Raises SourceError for one that cannot be used."""
        import h5py

        try:
            if "file" not in self._local.__dict__:
                self._local.file = h5py.File(self._path, "r")
            file = self._local.file
            if name not in file:
                return None
            link = file.get(name, getlink=True)
            found = file[name] if isinstance(link, h5py.HardLink) else None
            if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
                raise SourceError(f"{self._path}: `{name}` does not lie in the file itself as a data set.")
            self._check_storage(name, found)
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise SourceError(
                f"{self._path} cannot be read as HDF5: {printable(summarize(error))}."
            ) from error
        return found

    def _check_storage(self, name: str, found: Any) -> None:
        """Raises SourceError for a data set of far more bytes than the file has for it, and for pieces too large to unpack one."""
        stored = found.id.get_storage_size()
        if found.nbytes > FEW_BYTES and found.nbytes > self._limits.growth * stored:
            raise SourceError(
                f"{self._path}: `{name}` has {found.nbytes:,} bytes, of which {stored:,} are in the file: more than the "
                f"{self._limits.growth:,} times that are read (--max-growth)."
            )
        chunk = math.prod(found.chunks) * found.dtype.itemsize if found.chunks else 0
        if chunk > self._limits.file_bytes:
            raise SourceError(
                f"{self._path}: `{name}` is stored in pieces of {chunk / 2**20:,.0f} MiB, more than the {self._limits.file_megabytes} "
                "MiB that are read (--max-file-mb)."
            )

    def _read_labels(self) -> NDArray[np.int64] | None:
        found = self._dataset(LABELS)
        if found is None:
            return None
        if found.shape != (self._count,) or found.dtype.kind not in "iu":
            raise SourceError(
                f"{self._path}: `{LABELS}` is {found.dtype} {tuple(found.shape)}, it must be integers ({self._count},), one for each "
                "latent; --unlabelled leaves labels aside."
            )
        values = np.asarray(found[:])
        beyond = np.flatnonzero((values < 0) | (values >= MAX_CLASSES))
        if len(beyond):
            raise SourceError(
                f"{self._path}: the label {values[beyond[0]]} in row {beyond[0]} is none of 0 to {MAX_CLASSES - 1}."
            )
        return values.astype(np.int64)
