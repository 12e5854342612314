"""Which images a set holds, in which parts, by which settings; what of it is there already."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soflow_pipelines.sources.generated import MANIFEST_NAME, SETTINGS_NAME
from soflow_pipelines.storage.files import parse_json
from soflow_pipelines.storage.object_store import ObjectStore
from soflow_platform.errors import UserError
from soflow_platform.generation.chosen_labels import ChosenLabels
from soflow_platform.generation.execution import Execution
from soflow_platform.generation.generator import BATCH
from soflow_platform.generation.output_formats import FORMATS, NpzFormat, OutputFormat, PngFormat

PART_IMAGES = 1024
"""Images in a part, unless the set is small."""
SMALL_SET_PARTS = 8
"""A small set is cut into about so many parts, so that several workers can share it."""
PARTS_FOLDER = "_parts"
"""Records of the parts that are complete; readers of Parquet folders pass over names that begin with `_`."""
REJECTED_NAME = "rejected.parquet"
GRID_NAME = "grid.png"
NPZ_NAME = "samples.npz"
INFORMATION = ("model", "nfe")
"""Entries of the settings that decide nothing: another name of the same weights makes the same set."""


def images_per_part(count: int) -> int:
    """Images in a part: whole passes of the network."""
    passes = -(-count // (SMALL_SET_PARTS * BATCH))
    return min(PART_IMAGES, passes * BATCH)


@dataclass(frozen=True)
class PartTask:
    """A part to be made."""

    number: int
    images: int
    present: frozenset[int] = frozenset()
    """Indices whose image files are there already."""


@dataclass(frozen=True)
class GenerationPlan:
    """A set of generated images. Plain data: each worker gets a copy."""

    out: str
    """Folder or URI."""
    weights: str
    """Weights file that every worker can read."""
    settings: dict[str, Any]
    """The content of `generation.json`, which decides every byte of the set."""
    chosen: ChosenLabels
    class_names: tuple[str, ...] = ()
    sampling: dict[str, Any] | None = None
    """Sampler settings that differ from those of training."""
    autoencoder: str | None = None
    """Folder or id of the autoencoder; None: the one that the weights name."""
    batch: int = BATCH
    """Images decoded and encoded at a time."""

    @property
    def format(self) -> OutputFormat:
        return FORMATS[self.settings["format"]]

    @property
    def execution(self) -> Execution:
        """How network and decoder are run."""
        return Execution(**{each.name: self.settings[each.name] for each in fields(Execution)})

    @property
    def count(self) -> int:
        """Images of the set."""
        return len(self.chosen.indices)

    @property
    def parts(self) -> int:
        return -(-self.count // int(self.settings["per_part"]))

    def rows(self, part: int) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Indices and labels of a part's images."""
        size = int(self.settings["per_part"])
        chosen = slice(part * size, (part + 1) * size)
        labels = self.chosen.labels
        return self.chosen.indices[chosen], None if labels is None else labels[chosen]

    def image_name(self, index: int, label: int | None) -> str:
        """The file of a single image: `000012-label-3.png`, or `000012.png` of an unconditional network."""
        width = max(6, len(str(self.chosen.requested - 1)))
        return f"{index:0{width}d}{'' if label is None else f'-label-{label}'}.png"

    def image_names(self, part: int) -> Iterator[tuple[int, str]]:
        """Index and file of each image of a part, where images are files of their own."""
        indices, labels = self.rows(part)
        for position, index in enumerate(indices.tolist()):
            yield index, self.image_name(index, None if labels is None else int(labels[position]))

    def record_name(self, part: int) -> str:
        """The record that a part is complete."""
        return f"{PARTS_FOLDER}/part-{part:06d}.parquet"

    def missing(self, names: Sequence[str]) -> list[PartTask]:
        """The parts that have to be made, where a store holds these files."""
        there = set(names)
        if isinstance(self.format, NpzFormat) and {MANIFEST_NAME, NPZ_NAME} <= there:
            return []
        tasks = []
        for part in range(self.parts):
            images = len(self.rows(part)[0])
            present: frozenset[int] = frozenset()
            if isinstance(self.format, PngFormat):
                present = frozenset(index for index, name in self.image_names(part) if name in there)
                whole = len(present) == images
            else:
                whole = self.format.part_name(part) in there
            if not whole or self.record_name(part) not in there:
                tasks.append(PartTask(part, images, present))
        return tasks

    def written_names(self) -> set[str]:
        """Every file of images that the set will hold."""
        if isinstance(self.format, PngFormat):
            return {name for part in range(self.parts) for _, name in self.image_names(part)}
        parts = {self.format.part_name(part) for part in range(self.parts)}
        return parts | ({NPZ_NAME} if isinstance(self.format, NpzFormat) else set())


def claim(plan: GenerationPlan, store: ObjectStore, names: Sequence[str]) -> None:
    """Records the settings of a set in its place. Raises UserError where that holds something else, with what differs."""
    wanted = json.loads(json.dumps(plan.settings))
    if SETTINGS_NAME not in names:
        foreign = sorted(plan.written_names() & set(names))
        if foreign:
            raise UserError(
                f"{store.uri} holds {foreign[0]}, which this command did not make: choose another --out."
            )
        store.write(SETTINGS_NAME, json.dumps(wanted, indent=1).encode())
        return
    # A set of an earlier version does not say how network and decoder were run: as is the default.
    present = {**asdict(Execution()), **read_settings(store)}
    if "per_part" not in present:
        raise UserError(
            f"{store.uri} holds images of an earlier version of soflow, which kept no checksums: choose another --out."
        )
    compared = [name for name in wanted if name not in INFORMATION]
    differing = [name for name in compared if present.get(name) != wanted[name]]
    if differing:
        listed = "; ".join(
            f"{name} {_shown(present.get(name))}, now {_shown(wanted[name])}" for name in differing
        )
        raise UserError(
            f"{store.uri} holds images made with other settings ({listed}): choose another --out."
        )


def _shown(value: Any) -> str:
    text = "unknown" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:16]}..."


def read_settings(store: ObjectStore) -> dict[str, Any]:
    """The settings of a set. Raises UserError where the file is damaged, StorageError where it cannot be read."""
    try:
        settings = parse_json(store.read(SETTINGS_NAME))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{store.uri}: {SETTINGS_NAME} is damaged: choose another folder.")
    return settings
