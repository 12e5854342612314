"""The sections of a sweep file that the platform owns; objective and optimizer are `soflow_core`'s own settings.

Every section refuses unknown keys. Defaults are the paper's ImageNet recipe where the paper has one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


class TrainingConfig(Section):
    """How long, how much at once, and what is kept."""

    steps: Positive
    """Optimizer steps; the total K of the middle-time schedule r(k, K)."""
    batch: Positive = 256
    """Samples in one optimizer step, over all workers."""
    ema: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.9999,)
    """Decays of the exponential moving averages of the weights; the first is evaluated and registered."""
    precision: Literal["auto", "float32", "mixed", "bfloat16"] = "auto"
    """`auto`: mixed on a GPU and on a CPU with bfloat16 matrix units, float32 elsewhere."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Gradient norm limit; the paper's recipe has none."""
    compile: bool = False
    log_every: Positive = 50
    """Steps between two points of the training curves."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; None: at each evaluation."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept for each trial; the best one is kept besides."""


class EvaluationConfig(Section):
    """The numbers that trials are compared by: Fréchet distance on EMA samples against the training data."""

    every: Positive
    """Steps between evaluations; the last step is always evaluated."""
    samples: Annotated[int, Field(ge=16)] = 2048
    nfe: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2)
    """Numbers of function evaluations to score."""
    features: Literal["digits-classifier", "pooled"] = "pooled"
    """`digits-classifier`: a small network trained on the real digits. `pooled`: block averages of the training
    space itself, which needs no weights."""
    batch: Positive = 256
    labels: Literal["balanced", "uniform"] = "balanced"
    """Which labels samples get: every class equally often, or drawn (as the paper's FID is measured)."""
    grid: Annotated[int, Field(ge=1, le=16)] = 10
    """Rows and columns of the sample grid, drawn from the same noise at every evaluation."""
    seed: int = 0

    def metrics(self, conditional: bool) -> dict[str, Literal["min", "max"]]:
        """Names of the metrics an evaluation reports, with the direction that is better."""
        names: dict[str, Literal["min", "max"]] = {f"eval/fd_nfe{n}": "min" for n in self.nfe}
        if self.features == "digits-classifier" and conditional:
            names |= {f"eval/label_agreement_nfe{n}": "max" for n in self.nfe}
        return names


class Range(Section):
    """A continuous range to draw from."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        given = [r for r in (self.uniform, self.log_uniform) if r is not None]
        if len(given) != 1 or given[0][0] >= given[0][1]:
            raise ValueError(
                "a range is {uniform: [low, high]} or {log_uniform: [low, high]} with low < high"
            )
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError("the low end of log_uniform must be above 0")
        return self


class AshaConfig(Section):
    """Asynchronous successive halving: the worse trials stop at rungs, compared at equal steps of an equal K."""

    first_rung: Positive
    """Steps before the first comparison."""
    reduction: Annotated[int, Field(ge=2)] = 3


class SearchConfig(Section):
    """Which settings vary, and what decides between trials."""

    space: dict[str, list[Any] | Range] = {}
    """From a setting's path (`objective.weight_power`) to the values it takes, or a range."""
    algorithm: Literal["grid", "random"] = "grid"
    trials: Positive | None = None
    """Number of trials that `random` draws; `grid` tries every combination."""
    metric: str = "eval/fd_nfe1"
    mode: Literal["min", "max"] | None = None
    """None: the metric's own direction."""
    asha: AshaConfig | None = None

    @model_validator(mode="after")
    def _algorithm_fits(self) -> SearchConfig:
        ranges = [key for key, values in self.space.items() if isinstance(values, Range)]
        if self.algorithm == "grid" and ranges:
            raise ValueError(
                f"`{ranges[0]}` is a range: a grid needs a list of values, or set algorithm: random"
            )
        if self.algorithm == "grid" and self.trials is not None:
            raise ValueError("`trials` is for algorithm: random; a grid tries every combination")
        if self.algorithm == "random" and self.trials is None:
            raise ValueError("algorithm: random needs `trials`, the number of trials to draw")
        empty = [key for key, values in self.space.items() if isinstance(values, list) and not values]
        if empty:
            raise ValueError(f"`{empty[0]}` lists no values")
        return self


class ResourcesConfig(Section):
    """What one trial asks the cluster for."""

    workers: Positive = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    concurrent_trials: Positive | None = None
    """Trials that run at the same time; None: as many as fit."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Lost workers or nodes that one trial survives."""


class TrackingConfig(Section):
    """Where runs are recorded."""

    uri: str | None = None
    """MLflow tracking URI; None: SQLite under the storage folder."""
    experiment: str | None = None
    """MLflow experiment; None: the sweep's name."""


class RegistryConfig(Section):
    """Where the best trial's EMA weights are registered."""

    model: str | None = None
    """Registered model; None: the sweep's name. """
    enabled: bool = True
