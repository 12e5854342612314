"""Tar files in WebDataset's format as a source, also shard sets of pixels."""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from soflow_core.failures import printable, summarize
from soflow_pipelines.images.decode import ImageError, check_size, decode_image, pixels_of_npy
from soflow_pipelines.images.limits import DEFAULT_LIMITS, ImageLimits
from soflow_pipelines.shards.info import INFO_NAME
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.label_files import LABEL_BYTES, JsonLabels, number_labels, parse_number
from soflow_pipelines.sources.listing import is_leftover
from soflow_pipelines.sources.source import IMAGE_SUFFIXES, SourceError, listing_digest
from soflow_pipelines.sources.tar_files import members_of

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of compressed files."""
LABEL_ENDINGS = ("cls", "json", "txt")


@dataclass
class TarSample:
    """The members of one key that may be its image or its label, by extension."""

    images: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """Extension -> name of the member, its offset and its bytes."""
    labels: dict[str, tuple[str, int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class TarKeys:
    """Which members of a sample are its image and its label, where there are several."""

    image: str | None = None
    """Extension, such as `input.jpg`, or several with `;`."""
    label: str | None = None
    """Extension, such as `target.cls`, with `:FIELD` for a field of a JSON object."""
    unlabelled: bool = False
    """Whether labels are left aside."""


class TarSource:
    """WebDataset shards: for each key an image (`.jpg` or another, or a uint8 `.npy`) and a label (`.cls`, `.json`, `.txt`).

    As WebDataset has it, a key is a member's path up to the first dot of its base name, and its extension all that follows.
    Raises SourceError where they cannot be read, hold no images, or only some of these have labels, and ShardError for a
    `dataset.json` that cannot be understood.
    """

    block_ends: NDArray[np.int64] | None = None

    def __init__(
        self,
        files: Sequence[Path],
        name: str,
        keys: TarKeys | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.name = name
        self.ignored = 0
        self.channels = 3
        self.resolution: int | None = None
        self.label_origin: str | None = None
        self._limits = limits
        self._keys = keys or TarKeys()
        self._files = [str(path) for path in files]
        self._items: list[tuple[int, str, int, int]] = []
        """File, name of the member, its offset and its bytes."""
        members: list[tuple[int, TarSample]] = []
        for number, path in enumerate(files):
            samples = self._scan(path)
            with_image = [sample for sample in samples.values() if sample.images]
            with_image.sort(key=lambda sample: min(offset for _, offset, _ in sample.images.values()))
            members += [(number, sample) for sample in with_image]
            self.ignored += sum(1 for sample in samples.values() if not sample.images)
        if not members:
            raise SourceError(f"{name}: the shards hold no images (.jpg, .png, .npy ...).")
        self._items = [(number, *self._image_of(sample)) for number, sample in members]
        self.labels, self.class_names = self._labels_of(members)
        listed = [None] * len(members) if self.labels is None else self.labels.tolist()
        self.class_names = self._described_names(files[0].parent)
        self.digest = listing_digest([self._items, listed])

    def _scan(self, path: Path) -> dict[str, TarSample]:
        """The images and labels of one file, by key, in its order."""
        from webdataset.tariterators import base_plus_ext

        samples: dict[str, TarSample] = {}
        places: dict[str, tuple[int, int]] = {}
        _refuse_compressed(path)
        try:
            # Not compressed: images are read at their offsets in the file.
            with tarfile.open(path, "r:") as archive:
                for member in members_of(archive, path):
                    if member.isdir():
                        continue
                    if member.isfile():
                        places[member.name] = (member.offset_data, member.size)
                    # GNU tar stores a file that has two names once, and a hard link to it.
                    place = places.get(member.linkname) if member.islnk() else places.get(member.name)
                    key, extension = base_plus_ext(member.name)
                    ending = (extension or "").lower().rpartition(".")[2]
                    is_image = f".{ending}" in IMAGE_SUFFIXES or ending == "npy"
                    is_known = is_image or ending in LABEL_ENDINGS
                    if (
                        place is None
                        or key is None
                        or not is_known
                        or is_leftover(member.name.removeprefix("./"))
                    ):
                        self.ignored += 1
                        continue
                    sample = samples.setdefault(key, TarSample())
                    kept = sample.images if is_image else sample.labels
                    if extension.lower() in kept:
                        raise SourceError(f"{path}: {printable(member.name)} comes twice.")
                    kept[extension.lower()] = (member.name, *place)
        except (OSError, tarfile.TarError, ValueError, EOFError, OverflowError) as error:
            raise SourceError(
                f"{path} cannot be read as a WebDataset shard: {printable(summarize(error))}."
            ) from error
        return samples

    def _image_of(self, sample: TarSample) -> tuple[str, int, int]:
        """The member with a sample's image. Raises SourceError where it is not clear which it is."""
        names = ", ".join(printable(name) for name, *_ in sample.images.values())
        if self._keys.image is not None:
            for extension in self._keys.image.lower().split(";"):
                if extension in sample.images:
                    return sample.images[extension]
            raise SourceError(f"{self.name}: no {self._keys.image} beside {names} (--image-key).")
        if len(sample.images) > 1:
            raise SourceError(
                f"{self.name}: one sample has the images {names}: say which is meant with --image-key "
                f"{next(iter(sample.images))}, or another."
            )
        return next(iter(sample.images.values()))

    def _labels_of(
        self, members: Sequence[tuple[int, TarSample]]
    ) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
        """Labels (N,) and the names of their classes; None and () where there are none."""
        if self._keys.unlabelled:
            return None, ()
        found: list[int | str | None] = []
        for ending, parse in self._label_kinds():
            found = self._read_labels(members, ending, parse)
            if any(label is not None for label in found):
                self.label_origin = parse.describe(ending) if isinstance(parse, JsonLabels) else f".{ending}"
                break
        else:
            if self._keys.label is not None:
                raise SourceError(f"{self.name}: no sample has a label in {self._keys.label} (--label-key).")
            return None, ()
        missing = found.count(None)
        if missing:
            raise SourceError(
                f"{self.name}: {missing} of {len(found)} samples have no label in .{ending}, such as "
                f"{self.item_name(found.index(None))}; --unlabelled leaves labels aside."
            )
        return number_labels([label for label in found if label is not None], self.name)

    def _label_kinds(self) -> list[tuple[str, Callable[[bytes], int | str | None]]]:
        """(extension or its last part, how a label is read) of what may hold labels, the surest first."""
        if self._keys.label is not None:
            extension, _, wanted = self._keys.label.partition(":")
            if extension.lower().rpartition(".")[2] == "json":
                return [(extension.lower(), JsonLabels(wanted or None))]
            return [(extension.lower(), parse_number)]
        return [
            ("cls", parse_number),
            ("json", JsonLabels()),
            ("txt", parse_number),
        ]

    def _read_labels(
        self,
        members: Sequence[tuple[int, TarSample]],
        ending: str,
        parse: Callable[[bytes], int | str | None],
    ) -> list[int | str | None]:
        """The label of each sample in the members of one extension; None where there is none.

        Raises SourceError for a `.cls`, or a member that was asked for, that holds no label, and where two may be meant.
        """
        labels: list[int | str | None] = []
        with contextlib.ExitStack() as stack:
            current, file = -1, None
            for number, sample in members:
                chosen = [
                    place
                    for extension, place in sample.labels.items()
                    if extension == ending or (self._keys.label is None and extension.endswith(f".{ending}"))
                ]
                if len(chosen) > 1:
                    names = ", ".join(printable(name) for name, *_ in chosen)
                    raise SourceError(
                        f"{self.name}: one sample has the labels {names}: choose with --label-key."
                    )
                if not chosen:
                    labels.append(None)
                    continue
                name, offset, size = chosen[0]
                if file is None or current != number:
                    stack.close()
                    current, file = number, stack.enter_context(open(self._files[number], "rb"))
                label = parse(os.pread(file.fileno(), size, offset)) if size <= LABEL_BYTES else None
                if label is None and (ending == "cls" or self._keys.label is not None):
                    raise SourceError(
                        f"{self._files[number]}: {printable(name)} holds no label, which is a whole number of 0 or more"
                        f"{' or a name' if ending.endswith('json') else ''}."
                    )
                labels.append(label)
        return labels

    def _described_names(self, folder: Path) -> tuple[str, ...]:
        """Class names from `dataset.json` where there is one, which also has channels and resolution."""
        if not (folder / INFO_NAME).is_file() or (self.labels is None and not self._keys.unlabelled):
            return self.class_names
        info = read_info(folder)
        if info.kind != "pixels":
            raise SourceError(f"{self.name} holds latents; images are needed.")
        self.channels, self.resolution = info.shape[0], info.shape[1]
        fits = self.labels is not None and int(self.labels.max()) < len(info.class_names)
        return info.class_names if fits else self.class_names

    def __len__(self) -> int:
        return len(self._items)

    def item_name(self, item: int) -> str:
        """File and member of an image."""
        number, member, *_ = self._items[item]
        return f"{Path(self._files[number]).name}: {printable(member)}"

    def image(self, item: int) -> Image.Image:
        """An image as RGB, or L where `channels` is 1. Raises ImageError with its name where it is damaged or too large."""
        number, member, offset, size = self._items[item]
        name = self.item_name(item)
        check_size(size, name, self._limits)
        with open(self._files[number], "rb") as file:
            content = os.pread(file.fileno(), size, offset)
        if len(content) != size:
            raise ImageError(f"{name}: damaged (the tar file ends inside it).")
        if not member.lower().endswith(".npy"):
            return decode_image(content, name, self._limits)
        image = pixels_of_npy(content, name, self._limits)
        return image if self.channels == 1 else image.convert("RGB")


def _refuse_compressed(path: Path) -> None:
    """Raises SourceError for a compressed file, whatever its name."""
    try:
        with path.open("rb") as file:
            first = file.read(6)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
    for magic, kind in COMPRESSED.items():
        if first.startswith(magic):
            raise SourceError(f"{path} is compressed ({kind}): tar files are read in place, unpack it first.")
