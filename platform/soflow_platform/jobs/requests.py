"""Requests of the commands that score and generate images, as frozen dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soflow_platform.config.comparison import SamplingConfig
    from soflow_platform.evaluation.image_sources import LabelMode
    from soflow_platform.tuning.record import SweepRecord


@dataclass(frozen=True)
class ProtocolRequest:
    """Settings of the scoring protocol."""

    metrics: tuple[str, ...] = ()
    """Empty: the default metrics of the features."""
    features: str | None = None
    """Feature network. None: inception, or the digits classifier for networks trained on the digits."""
    reference: str | None = None
    """Real images. None: the data that the network was trained on."""
    autoencoder: str | None = None
    """Decodes latents. None: the autoencoder that made them."""


@dataclass(frozen=True)
class SamplingRequest:
    """How a network generates the images that are scored."""

    steps: tuple[int, ...] = (1,)
    """Numbers of sampling steps, each scored."""
    labels: LabelMode = "uniform"
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """Sampler settings that differ from those of training, such as `{"sampling_scale": 2.0}`."""


@dataclass(frozen=True)
class EvaluateRequest:
    """Request of `soflowctl evaluate`."""

    target: str
    """Name of a model, a checkpoint or a set of images, as `jobs.targets` resolves it."""
    num: int | None = None
    """Images to score. None: 50,000 of a network, all of a folder or file."""
    sampling: SamplingRequest = SamplingRequest()
    protocol: ProtocolRequest = ProtocolRequest()


@dataclass(frozen=True)
class CompareRequest:
    """Request of `soflowctl compare`."""

    record: SweepRecord
    """The sweep whose trials are compared."""
    protocol: tuple[SamplingConfig, ...]
    """Ways of sampling each trial."""


@dataclass(frozen=True)
class GenerateRequest:
    """Request of `soflowctl generate`."""

    model: str
    """Name of the weights, as `jobs.targets` resolves it."""
    out: Path
    """Folder for the images."""
    num: int = 100
    steps: int = 1
    seed: int = 0
    label: int | None = None
    """Class of all images. None: every class in turn."""
