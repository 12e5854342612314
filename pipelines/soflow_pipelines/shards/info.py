"""Description of a shard set (`dataset.json`), and whether it fits a network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from soflow_core.failures import InputError
from soflow_pipelines.shards.schema import MAX_SAMPLE_BYTES, check_description, parse_object
from soflow_pipelines.storage.files import short_digest

INFO_NAME = "dataset.json"
ITEM_BYTES = {"uint8": 1, "float16": 2, "float32": 4}
WRITER_VERSION = 1


class ShardError(InputError):
    """A shard set that is missing or damaged. The text names set, shard, key and what is wrong."""


class DataMismatch(InputError, ValueError):
    """Data and network that do not fit each other. The text names both sides."""


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`.

    Latents are stored as (2C, H, W): posterior mean, then standard deviation, unscaled; a network takes
    ((mean + std eps) - shift) scaling of shape (C, H, W).
    """

    kind: Literal["pixels", "latents"]
    shape: tuple[int, int, int]
    """(C, H, W) of a sample as a network takes it."""
    dtype: Literal["uint8", "float16", "float32"]
    classes: int | None = None
    class_names: tuple[str, ...] = field(default=(), repr=False)
    resolution: int | None = None
    """Pixels of the images' sides, before the autoencoder."""
    crop: str | None = None
    flips: bool = False
    autoencoder: str | None = None
    autoencoder_digest: str | None = None
    scaling: float = 1.0
    shift: float = 0.0
    left_out: tuple[str, ...] = ()
    """Damaged images that were left out on request."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Source and settings that it was prepared from."""
    writer_version: int = WRITER_VERSION
    samples: int = 0
    shards: int = 0
    bytes: int = 0
    digest: str = ""
    """Of the shards' bytes and how they are read: `sha256:...`; see `tables.content_digest`."""

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"a sample's shape is (C, H, W), not {self.shape}")
        if (self.kind == "pixels") != (self.dtype == "uint8"):
            raise ValueError(f"pixels are uint8 and latents float16 or float32; {self.kind} are {self.dtype}")
        if self.class_names and len(self.class_names) != self.classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.classes} classes")
        if self.sample_bytes > MAX_SAMPLE_BYTES:
            raise ValueError(
                f"a sample of {format_shape(self.stored_shape)} {self.dtype} has {self.sample_bytes} bytes"
            )

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the stored array."""
        channels, height, width = self.shape
        return (channels * 2 if self.kind == "latents" else channels), height, width

    @property
    def sample_bytes(self) -> int:
        """Bytes of a stored array, without the header of its file."""
        return math.prod(self.stored_shape) * ITEM_BYTES[self.dtype]

    def short_digest(self, length: int = 16) -> str:
        """The first hexadecimal digits of the digest."""
        return short_digest(self.digest, length)

    def to_json(self) -> str:
        """The text of `dataset.json`. A name that is not UTF-8 is written with JSON's escapes, and read back exactly."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        return text.encode("utf-8", "backslashreplace").decode()

    @classmethod
    def from_json(cls, text: str) -> DatasetInfo:
        """Reads the text of `dataset.json`. Raises ValueError where it is not one."""
        return cls.from_dict(parse_object(text))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DatasetInfo:
        """The description that `asdict` made into a dictionary. Unknown fields are ignored.

        Raises ValueError where it is not one, or of a newer version.
        """
        check_description(content)
        if content.get("writer_version", 0) > WRITER_VERSION:
            raise ValueError(
                f"the format is version {content['writer_version']}, this soflow reads up to {WRITER_VERSION}"
            )
        missing = [name for name in ("kind", "shape", "dtype") if name not in content]
        if missing:
            raise ValueError(f"it has no {missing[0]}")
        known: dict[str, Any] = {
            field.name: content[field.name] for field in fields(cls) if field.name in content
        }
        listed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in known.items()
        }
        return cls(**listed)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> DatasetInfo | None:
        """The description of the training data in the header of a weights file; None where the header has none."""
        try:
            return cls.from_json(json.dumps(dict(facts)))
        except (TypeError, ValueError):
            return None

    def check_fits(
        self,
        shape: Sequence[int],
        classes: int | None = None,
        autoencoder: str | None = None,
        scaling: float | None = None,
        where: str = "the data",
    ) -> None:
        """Checks that a network for samples (C, H, W) can train on this data. Raises DataMismatch.

        `classes` None is an unconditional network, which fits any data. `autoencoder` (an id, or the digest
        of its weights) and `scaling` are compared unless they are None. `where` names the data in the error.
        """
        if tuple(shape) != self.shape:
            raise DataMismatch(
                f"{where} holds {self.kind} of shape {format_shape(self.shape)}, the network takes {format_shape(shape)}."
            )
        if classes is not None and classes != self.classes:
            held = "no labels" if self.classes is None else f"{self.classes} classes"
            raise DataMismatch(f"{where} holds {held}, the network is conditioned on {classes} classes.")
        if autoencoder is not None and autoencoder not in (self.autoencoder, self.autoencoder_digest):
            held = f"latents of {self.autoencoder}" if self.kind == "latents" else "pixels"
            raise DataMismatch(
                f"{where} holds {held}, the configuration names the autoencoder {autoencoder}."
            )
        if scaling is not None and abs(scaling - self.scaling) > 1e-6 * abs(self.scaling):
            raise DataMismatch(
                f"{where} is scaled by {self.scaling:g}, the configuration says a scaling of {scaling:g}."
            )


def format_shape(shape: Sequence[int]) -> str:
    """(3, 32, 32) -> `3 x 32 x 32`."""
    return " x ".join(str(side) for side in shape)
