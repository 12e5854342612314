"""What a section of a sweep file is, and the sections that say what is trained on what and where it is kept.

Every section refuses unknown keys. Defaults are the paper's ImageNet recipe where the paper has one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A part of a sweep file: immutable, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Section):
    """Which shard set is trained on, and what the configuration expects to find in it."""

    source: str | None = None
    """A built-in data set (`digits`), or the folder or URI of a shard set. None: must be set before a run."""
    shape: tuple[Positive, Positive, Positive] | None = None
    """(C, H, W) the network is built for; None takes it from the data."""
    classes: Positive | None = None
    """Number of classes; None takes it from the data."""
    autoencoder: str | None = None
    """Whose latents are expected: an id, or the digest of the weights; None does not check."""
    scaling: Annotated[float, Field(gt=0)] | None = None
    """What latents are expected to be multiplied by; None does not check."""
    conditional: bool = True
    """False trains without labels."""


class NetworkConfig(Section):
    """The DiT: a named size such as `XL/2`, or its four numbers."""

    size: str | None = None
    patch: Positive | None = None
    hidden: Positive | None = None
    depth: Positive | None = None
    heads: Positive | None = None

    @model_validator(mode="after")
    def _one_description(self) -> NetworkConfig:
        numbers = [self.patch, self.hidden, self.depth, self.heads]
        if (self.size is None) == all(n is None for n in numbers) or (self.size is None and None in numbers):
            raise ValueError(
                "give either `size` (such as XL/2) or all of `patch`, `hidden`, `depth` and `heads`"
            )
        if self.hidden is not None and self.heads is not None and self.hidden % self.heads:
            raise ValueError(f"`hidden` ({self.hidden}) must be a multiple of `heads` ({self.heads})")
        return self


def absolute_place(place: str) -> str:
    """A folder as processes with other working folders find it, or `s3://bucket/prefix`. Raises ValueError for other schemes."""
    scheme, separator, rest = place.partition("://")
    if not separator or scheme == "file":
        return str(Path(rest if separator else place).expanduser().absolute())
    if scheme != "s3":
        raise ValueError(f"{scheme}:// cannot be written: give a folder or s3://bucket/prefix")
    if not rest.partition("?")[0].partition("/")[0]:
        raise ValueError(f"{place} names no bucket: give s3://bucket/prefix")
    return place


def absolute_tracking(uri: str) -> str:
    """A tracking URI with the path of an SQLite file made absolute. Raises ValueError for a folder, which MLflow does not take."""
    if uri.startswith("sqlite:"):
        path = uri.removeprefix("sqlite:///")
        if path in ("", uri):
            raise ValueError(f"{uri} names no file: give sqlite:///FILE")
        return f"sqlite:///{Path(path).expanduser().absolute()}"
    if uri.startswith("file:") or ("://" not in uri and uri != "databricks"):
        raise ValueError(f"{uri} is no tracking server: give http://HOST:PORT or sqlite:///FILE")
    return uri


class TrackingConfig(Section):
    """Where runs are recorded."""

    uri: str | None = None
    """MLflow tracking URI; None: SQLite under the storage folder."""
    experiment: str | None = None
    """MLflow experiment; None: the sweep's name."""

    @field_validator("uri")
    @classmethod
    def _same_from_everywhere(cls, uri: str | None) -> str | None:
        return uri if uri is None else absolute_tracking(uri)


class RegistryConfig(Section):
    """Where the best trial's EMA weights are registered."""

    model: str | None = None
    """Registered model; None: the sweep's name. """
    enabled: bool = True
