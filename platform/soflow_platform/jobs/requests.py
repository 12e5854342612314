"""Requests of the commands that score and generate images, as frozen dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    diversity: bool = False
    """Whether precision and recall stand beside the default metrics, where the features give them."""


@dataclass(frozen=True)
class SamplingRequest:
    """How a network generates the images that are scored."""

    steps: tuple[int, ...] | None = None
    """Numbers of sampling steps, each scored. None: `sampling.steps` of the sweep, or 1."""
    labels: LabelMode | Literal["both"] = "uniform"
    seed: int = 0
    seeds: int = 1
    """Number of seeds, from `seed` on, each scored."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Sampler settings that differ from those of training, such as `{"sampling_scale": 2.0}`."""
    guidance: tuple[float, ...] = ()
    """Guidance scales, each scored; empty: that of the settings, or of training."""

    def numbers(self, usual: int | None) -> tuple[int, ...]:
        """Numbers of steps, where `usual` is `sampling.steps` of the target's sweep."""
        return self.steps or (usual or 1,)

    @property
    def seed_numbers(self) -> range:
        """Every seed."""
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True)
class EvaluateRequest:
    """Request of `soflowctl evaluate`."""

    target: str
    """Name of a model, a checkpoint or a set of images, as `jobs.targets` resolves it."""
    num: int | None = None
    """Images to score. None: 50,000 of a network, all of a folder or file."""
    sampling: SamplingRequest = SamplingRequest()
    protocol: ProtocolRequest = ProtocolRequest()
    plotted: bool = False
    """Whether the scores are drawn against what a network was sampled with."""


@dataclass(frozen=True)
class StepSearch:
    """Size of the search of `soflowctl evaluate --search-steps` for a time grid."""

    trials: int = 32
    """Grids that are tried at most, for each number of steps."""
    seeds: int = 3
    """Seeds that the grid found and the default one are scored on; none of them is the seed of the search."""


@dataclass(frozen=True)
class PromoteRequest:
    """Request of `soflowctl promote`."""

    model: str
    """Registered model with its alias or version, or SWEEP/TRIAL."""
    samples: int | None = None
    """Samples for each seed. None: those of the gate or of the sweeps."""
    reference: str | None = None
    """Real images. None: those of the gate, or the candidate's training data."""
    autoencoder: str | None = None
    """Decodes latents. None: the autoencoder that made them."""
    force: str | None = None
    """Reason to promote without scoring."""
    reuse_scores: bool = False
    """Compare the scores that were stored when each version was trained."""
    dry_run: bool = False
    """Decide, and change nothing."""


@dataclass(frozen=True)
class CompareRequest:
    """Request of `soflowctl compare`."""

    record: SweepRecord
    """The sweep whose trials are compared."""
    protocol: tuple[SamplingConfig, ...]
    """Ways of sampling each trial."""
    others: tuple[SweepRecord, ...] = ()
    """Further sweeps, whose trials are compared with these."""

    @property
    def records(self) -> tuple[SweepRecord, ...]:
        """Every sweep."""
        return (self.record, *self.others)

    @property
    def name(self) -> str:
        """The ids of the sweeps."""
        return " + ".join(record.id for record in self.records)


@dataclass(frozen=True)
class GenerateRequest:
    """Request of `soflowctl generate`."""

    model: str
    """Name of the weights, as `jobs.targets` resolves it."""
    out: str
    """Folder or URI for the images."""
    num: int | None = None
    """Images; None: 100, or as many as the table has rows."""
    labels: str | None = None
    """`balanced`, `uniform`, or labels such as `0,1,2` in turn. None: balanced, or the table's."""
    table: Path | None = None
    """Parquet file whose row i has the label of image i."""
    skip_bad: bool = False
    """Leave out rows of the table that cannot be used."""
    steps: int | None = None
    """None: `sampling.steps` of the sweep, or 1."""
    seed: int = 0
    format: str = "png"
    """Name of an output format, as `generation.output_formats` lists them."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Sampler settings that differ from those of training."""
    autoencoder: str | None = None
    """Decodes latents. None: the autoencoder that made them."""
    batch: int = 64
    """Images decoded and encoded at a time."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the passes of network and decoder."""
    compile: bool = False
    """Compile the network."""
    graphs: bool = False
    """Record the network's pass as a CUDA graph."""
    workers: int | None = None
    """Actors; None: one for each GPU or CPU, and none for few images."""
    address: str | None = None
    """A running Ray cluster; None: this machine."""
