"""Image sets that are read by number: folders, archives, ADM's .npz files and shard sets."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soflow_pipelines.images.codec import Decoder
from soflow_pipelines.images.convert import to_uint8
from soflow_pipelines.images.decode import centre_crop, to_array
from soflow_pipelines.metrics.reservoir import fixed_subset
from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo
from soflow_pipelines.shards.reader import SampleReader
from soflow_pipelines.shards.tables import read_index, read_info
from soflow_pipelines.sources.opening import open_source
from soflow_pipelines.sources.source import Source, SourceError
from soflow_pipelines.storage.files import sha256
from soflow_pipelines.storage.opening import open_storage

DAMAGES = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a member of a damaged .npz file raises; RuntimeError where it is packed in a way that is not known."""


class ImageSet(Protocol):
    """Images of one size, numbered from 0."""

    name: str
    labels: NDArray[np.int64] | None
    """(N,) where the images have labels."""

    @property
    def digest(self) -> str:
        """Digest of the images and of their preprocessing; equal for equal images."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Tensor:
        """uint8 (stop - start, C, H, W)."""


def batches(images: ImageSet, size: int = 64) -> Iterator[Tensor]:
    """The images in order: uint8 (B, C, H, W)."""
    for start in range(0, len(images), size):
        yield images.read(start, min(start + size, len(images)))


class PartOfImages:
    """`count` images of a set, chosen by a fixed permutation of their numbers, in the order of the set."""

    def __init__(self, images: ImageSet, count: int) -> None:
        self._images, self._rows = images, fixed_subset(len(images), count)
        self.name, self.digest = images.name, f"{images.digest}-{count}"
        self.labels = None if images.labels is None else images.labels[self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Tensor:
        rows = self._rows[start:stop]
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        return torch.cat([self._images.read(int(run[0]), int(run[-1]) + 1) for run in runs])


def open_image_set(
    place: str | Path, resolution: int | None = None, decoder: Decoder | None = None
) -> ImageSet:
    """A shard set (with `decoder` where it holds latents), an .npz file, or a source of images as `open_source` takes them.

    `resolution` makes the ADM centre crop of the images of a source; without it they must be of one size. Raises
    SourceError, ShardError or StorageError where the place is none of these.
    """
    if is_shard_set(place):
        return ShardImages(place, decoder)
    if str(place).endswith(".npz"):
        return NpzImages(Path(place).expanduser())
    return SourceImages(open_source(str(place)), resolution)


def is_shard_set(place: str | Path) -> bool:
    """Whether the location is a shard set. A remote location always counts as one: opening it raises an error where it is none."""
    place = str(place)
    if place.endswith(".npz"):
        return False
    return "://" in place or open_storage(place).size(INFO_NAME) is not None


def npz_path(place: str | Path) -> Path:
    """The .npz file at a place. Raises SourceError where there is none."""
    path = Path(place).expanduser()
    if not path.is_file():
        raise SourceError(f"there is no file {place} on this machine, where .npz files are read from.")
    return path


class SourceImages:
    """Images of a folder, an archive or a table."""

    def __init__(self, source: Source, resolution: int | None = None) -> None:
        self._source, self._resolution = source, resolution
        self._size: tuple[int, ...] | None = None
        self.name = source.name
        self.digest = source.digest if resolution is None else f"{source.digest}-adm{resolution}"
        self.labels = source.labels

    def __len__(self) -> int:
        return len(self._source)

    def sizes(self, items: Iterable[int]) -> set[tuple[int, int]]:
        """Heights and widths of some of the images, as they are stored."""
        return {(image.height, image.width) for image in map(self._source.image, items)}

    def read(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(np.stack([self._image(item) for item in range(start, stop)]))

    def _image(self, item: int) -> NDArray[np.uint8]:
        image = self._source.image(item)
        if self._resolution is not None:
            if min(image.size) < self._resolution:
                raise SourceError(
                    f"{self.name}: {self._source.item_name(item)} is {image.height} x {image.width}, smaller than the "
                    f"{self._resolution} x {self._resolution} that is wanted: images are not enlarged, take larger ones."
                )
            return to_array(centre_crop(image, self._resolution))
        array = to_array(image)
        if self._size is None:
            self._size = to_array(self._source.image(0)).shape
        if array.shape != self._size:
            raise SourceError(
                f"{self.name}: {self._source.item_name(item)} is {array.shape[1]} x {array.shape[2]}, the first image is "
                f"{self._size[1]} x {self._size[2]}: give the resolution to crop them to, or a shard set made of them."
            )
        return array


class NpzImages:
    """The samples of an .npz file as ADM's evaluation writes and reads them: `arr_0` uint8 (N, H, W, 3), labels in `arr_1`.

    They are never in memory together. Reading forward continues in the open file; a step back opens it again, for it may be compressed.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.name = path, path.name
        self._opened: tuple[IO[bytes], int] | None = None
        try:
            with opened_npz(path) as archive:
                names = archive.namelist()
                if "arr_0.npy" not in names:
                    raise SourceError(f"{path} holds no images: it has no arr_0.")
                with archive.open("arr_0.npy") as member:
                    self._shape, fortran, dtype = _npy_header(member, path)
        except DAMAGES as error:
            raise SourceError(f"{path}: arr_0 is damaged ({error}).") from error
        if fortran:
            raise SourceError(f"{path}: arr_0 is in Fortran's order, images are not.")
        if len(self._shape) != 4 or self._shape[3] not in (1, 3) or dtype != np.uint8:
            raise SourceError(f"{path}: arr_0 is {dtype} {self._shape}, images are uint8 (N, H, W, 1 or 3).")
        self.labels: NDArray[np.int64] | None = self._labels() if "arr_1.npy" in names else None
        self._digest: str | None = None

    def _labels(self) -> NDArray[np.int64] | None:
        """`arr_1` as labels; None where it holds something else, such as names."""
        try:
            with opened_npz(self._path) as archive, archive.open("arr_1.npy") as member:
                shape, _, dtype = _npy_header(member, self._path)
            if shape != self._shape[:1] or dtype.kind not in "iu":
                return None
            with np.load(self._path) as arrays:
                return np.asarray(arrays["arr_1"], np.int64)
        except DAMAGES as error:
            raise SourceError(f"{self._path}: arr_1 is damaged ({error}).") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def digest(self) -> str:
        if self._digest is None:
            self._digest = sha256(self._path)
        return self._digest

    @property
    def resolution(self) -> tuple[int, int]:
        return self._shape[1], self._shape[2]

    def __len__(self) -> int:
        return self._shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        _, height, width, channels = self._shape
        each = height * width * channels
        try:
            member = self._at(start, each)
            content = member.read((stop - start) * each)
        except DAMAGES as error:
            raise SourceError(f"{self._path}: arr_0 is damaged ({error}).") from error
        if len(content) != (stop - start) * each:
            raise SourceError(f"{self._path}: arr_0 ends before image {stop}.")
        self._opened = (member, stop)
        pixels = np.frombuffer(content, np.uint8).reshape(-1, height, width, channels)
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())

    def _at(self, start: int, each: int) -> IO[bytes]:
        """The pixels, opened at the image `start`."""
        member, position = self._opened or (None, 0)
        if member is None or start < position:
            member, position = opened_npz(self._path).open("arr_0.npy"), 0
            _npy_header(member, self._path)
        member.seek((start - position) * each, os.SEEK_CUR)
        return member


def opened_npz(path: Path) -> zipfile.ZipFile:
    """The archive of an .npz file. Raises SourceError where it is none."""
    try:
        return zipfile.ZipFile(path)
    except DAMAGES as error:
        raise SourceError(f"{path} is not an .npz file that can be read: {error}.") from error


def _npy_header(member: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape of the array whose data come next, whether they are in Fortran's order, and their type."""
    try:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
    except ValueError as error:
        raise SourceError(f"{path}: an array is damaged ({error}).") from error
    return shape, fortran, dtype


def shard_images_digest(info: DatasetInfo) -> str:
    """Digest of the images of a shard set, latents decoded."""
    return f"{info.digest}-decoded" if info.kind == "latents" else info.digest


class ShardImages:
    """The images of a shard set in the order of its index; latents are decoded from their posterior means."""

    def __init__(self, uri: str | Path, decoder: Decoder | None = None) -> None:
        self._info = read_info(uri)
        self._decoder = decoder
        if self._info.kind == "latents" and decoder is None:
            raise SourceError(
                f"{uri} holds latents: images of them need the autoencoder {self._info.autoencoder}."
            )
        self._samples = SampleReader(uri, self._info)
        self.name = f"{uri}, decoded" if self._info.kind == "latents" else str(uri)
        self.digest = shard_images_digest(self._info)
        self.labels: NDArray[np.int64] | None = None
        if self._info.classes is not None:
            self.labels = read_index(uri, ["label"])["label"].to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return self._info.samples

    def read(self, start: int, stop: int) -> Tensor:
        stored = torch.from_numpy(self._samples.read(np.arange(start, stop))[0].copy())
        if self._info.kind == "pixels":
            return stored
        assert self._decoder is not None
        mean = stored.chunk(2, dim=1)[0].float()
        return to_uint8(self._decoder.decode((mean - self._info.shift) * self._info.scaling))
