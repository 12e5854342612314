"""Base class of all sections of a sweep file, and the sections `data`, `network` and `tracking`.

Every section refuses unknown keys. Defaults are the paper's ImageNet recipe where the paper has one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from soflow_core.networks import Architecture, DiTConfig, dit_config
from soflow_core.networks.dit import LARGEST, MOST_TOKENS, PARITY
from soflow_platform.config.locations import absolute_tracking

Positive = Annotated[int, Field(gt=0, le=10**15)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Minutes = Annotated[float, Field(gt=0, le=60 * 24 * 365)]
Samples = Annotated[int, Field(gt=0, le=2**20)]
"""Samples that are computed at once."""
Steps = Annotated[int, Field(gt=0, le=10_000)]
"""Steps of a sampler."""


class Section(BaseModel):
    """A part of a sweep file: immutable, strict about its keys, with finite numbers and texts of bounded length."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=4096)


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


class NetworkSection(Section):
    """The section `network`: the settings of an architecture that do not come from the data or the method."""

    architecture_class: ClassVar[type[Architecture]]

    def architecture(self, **given: Any) -> Architecture:
        """The architecture with these settings and what is `given` by data and method. Raises ValueError where they do not fit."""
        return self.architecture_class(
            **given, **{name: getattr(self, name) for name in type(self).model_fields}
        )

    @property
    def title(self) -> str:
        """The network in a few characters, for tags of runs."""
        return str(getattr(self, "kind", self.architecture_class.__name__))


class NetworkConfig(NetworkSection):
    """The DiT: a named size such as `XL/2`, or its four numbers; and where it departs from the paper's network."""

    architecture_class = DiTConfig

    kind: Literal["dit"] = "dit"
    size: str | None = None
    patch: Annotated[int, Field(gt=0, le=LARGEST["patch"])] | None = None
    hidden: Annotated[int, Field(gt=0, le=LARGEST["hidden"])] | None = None
    depth: Annotated[int, Field(gt=0, le=LARGEST["depth"])] | None = None
    heads: Annotated[int, Field(gt=0, le=LARGEST["heads"])] | None = None
    qk_norm: bool = False
    rope: bool = False
    swiglu: bool = False
    registers: Annotated[int, Field(ge=0, le=MOST_TOKENS["registers"])] = 0
    condition_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS["condition_tokens"])] = 0
    velocity_blocks: Annotated[int, Field(ge=0, le=LARGEST["depth"])] = 0
    difference_alone: bool = False

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

    def architecture(self, **given: Any) -> Architecture:
        options: dict[str, Any] = {name: getattr(self, name) for name in PARITY}
        if self.size is not None:
            return replace(dit_config(self.size, **given), **options)
        numbers: dict[str, Any] = {
            name: getattr(self, name) or 0 for name in ("patch", "hidden", "depth", "heads")
        }
        return DiTConfig(**given, **numbers, **options)

    @property
    def title(self) -> str:
        return self.size or f"DiT-{self.hidden}x{self.depth}/{self.patch}"


class TrackingConfig(Section):
    """Where runs are recorded."""

    uri: str | None = None
    """MLflow tracking URI; None: SQLite under the storage folder."""
    experiment: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """MLflow experiment; None: the sweep's name."""

    @field_validator("uri")
    @classmethod
    def _same_from_everywhere(cls, uri: str | None) -> str | None:
        return uri if uri is None else absolute_tracking(uri)
