"""Settings of the training loop and of the machines it runs on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from soflow_platform.config.evaluation import known_features
from soflow_platform.config.locations import absolute_place, absolute_weights
from soflow_platform.config.mid_run import SettingsChange
from soflow_platform.config.sections import Minutes, Positive, Samples, Section


class AlignmentConfig(Section):
    """A further term of the loss: tokens of a block learn to tell the features of the clean image."""

    weight: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Factor of 1 - cosine similarity; 0 is no alignment."""
    features: str | None = None
    """Feature network, as `evaluation.features`; its features of patches where it gives them, else those of the image."""
    block: Annotated[int, Field(gt=0, le=2**10)] | None = None
    """Block behind which tokens are taken, counted from 1; None: the middle one."""

    @field_validator("features")
    @classmethod
    def _known_features(cls, name: str | None) -> str | None:
        return name if name is None else known_features(name)

    @model_validator(mode="after")
    def _features_are_named(self) -> AlignmentConfig:
        if self.active and self.features is None:
            raise ValueError(
                "`weight` is above 0 and `features` is not set: name a feature network, or set `weight` to 0"
            )
        return self

    @property
    def active(self) -> bool:
        """Whether the loss has the term."""
        return self.weight > 0


class TrainingConfig(Section):
    """How long, how much at once, and what is kept."""

    steps: Positive
    """Optimizer steps; the total K of the middle-time schedule r(k, K)."""
    batch: Samples = 256
    """Samples in one optimizer step, over all workers."""
    ema: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.9999,)
    """Decays of the exponential moving averages of the weights; the first is evaluated and registered."""
    ema_every: Annotated[int, Field(gt=0, le=10_000)] = 1
    """Steps between two updates of all averages, each with the factors of so many steps; above 1 they are computed in float64."""
    ema_profiles: Annotated[tuple[Annotated[float, Field(gt=0, lt=0.28)], ...], Field(max_length=8)] = ()
    """Relative widths of power-function averages, whose snapshots `soflowctl ema` makes averages of other widths of; two are usual."""
    ema_snapshot_every: Positive | None = None
    """Steps between these snapshots; None: at each evaluation."""
    augment: Annotated[float, Field(gt=0, le=1)] | None = None
    """Probability of each geometric augmentation, whose labels the network must know (`network.augmentations`); None is none."""
    alignment: AlignmentConfig = AlignmentConfig()
    precision: Literal["auto", "float32", "mixed", "bfloat16"] = "auto"
    """`auto`: mixed on a GPU and on a CPU with bfloat16 matrix units, float32 elsewhere."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Gradient norm limit; the paper's recipe has none."""
    start_from: Annotated[str, Field(min_length=1)] | None = None
    """Weights that the network starts from: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, SWEEP/TRIAL, a checkpoint folder or a file;
    None: fresh ones."""
    start_weights: Literal["ema", "raw"] = "ema"
    """Which of them: the average, or those that were trained."""
    start_layout: Literal["soflow", "sit", "dit"] | None = None
    """Whose official code wrote the file; None: SoFlow's, or this platform."""
    class_run: Annotated[int, Field(gt=0, le=2**20)] = 1
    """Samples of one class that follow each other: a batch is then of few classes, for methods that compare its images."""
    accumulate: Positive = 1
    """Pieces that each worker takes its samples of a step in, one after the other: less memory, the same gradients."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """`ddp`: every worker holds the whole network. `fsdp`: each holds a share of it and of its optimizer state."""
    recompute: bool = False
    """Runs the network's blocks again in the backward pass: less memory, a forward pass more for each pass with gradient."""
    compile: bool = False
    graphs: bool = False
    """Records passes and update of a step as CUDA graphs and replays them: for kernels that are shorter than their launches."""
    deterministic: bool = False
    """Deterministic kernels alone, so that a GPU repeats a run bit for bit; slower. CPUs do so anyway."""
    draws: Literal["auto", "generator", "counter"] = "auto"
    """How noise, times, dropped labels and posterior samples are drawn: `generator`: one after the other, on the CPU; `counter`: on the
    device, each as a function of seed, step and row. `auto`: `counter` on a GPU. A trial goes on as it began."""
    changes: Annotated[tuple[SettingsChange, ...], Field(max_length=1000)] = ()
    """Settings that have other values from a step on: loss weights, time schedules, the learning rate."""
    log_every: Positive = 50
    """Steps between two points of the training curves."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; None: at each evaluation."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept for each trial; the best one is kept besides."""
    checkpoints: str | None = None
    """Folder or `s3://bucket/prefix` that checkpoints go to, below it by sweep and trial; None: the project folder."""
    patience_minutes: Minutes = 10
    """How long a checkpoint storage or a tracking server may be away before a trial fails."""
    grace_seconds: Annotated[float, Field(gt=0, le=86_400)] = 25
    """How long trials may take to save after SIGTERM before the command ends; what sends it usually sends SIGKILL after 30."""

    @field_validator("ema", "ema_profiles")
    @classmethod
    def _different(cls, decays: tuple[float, ...]) -> tuple[float, ...]:
        twice = [decay for decay in decays if decays.count(decay) > 1]
        if twice:
            raise ValueError(f"{twice[0]:g} is given twice: keep one")
        return decays

    @field_validator("start_from")
    @classmethod
    def _absolute_weights(cls, name: str | None) -> str | None:
        return name if name is None else absolute_weights(name)

    @field_validator("checkpoints")
    @classmethod
    def _same_from_everywhere(cls, place: str | None) -> str | None:
        return place if place is None else absolute_place(place)


class ResourcesConfig(Section):
    """What one trial asks the cluster for."""

    workers: Annotated[int, Field(gt=0, le=10_000)] = 1
    min_workers: Positive | None = None
    """With fewer workers than `workers` a trial goes on as long as it has this many, some with a row more than others where the batch
    does not divide; None: it waits for all."""
    cpus_per_worker: Annotated[float, Field(gt=0, le=10_000)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0, le=10_000)] = 0
    concurrent_trials: Positive | None = None
    """Trials that run at the same time; None: as many as fit."""
    autoscale: bool = False
    """Whether the cluster adds machines on demand: what does not fit now is then waited for, `wait_minutes` at most, not refused."""
    max_failures: Annotated[int, Field(ge=0, le=10_000)] = 3
    """Lost workers or nodes that one trial survives."""
    wait_minutes: Minutes = 30
    """How long a trial waits for machines to start or to start again on before it fails."""

    @model_validator(mode="after")
    def _range_of_workers(self) -> ResourcesConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"`min_workers` ({self.min_workers}) is above `workers` ({self.workers}): lower it"
            )
        return self

    @field_validator("gpus_per_worker")
    @classmethod
    def _whole_gpus(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(
                f"`gpus_per_worker` is {gpus:g}: Ray gives parts of one GPU or whole ones; take {int(gpus)} or {int(gpus) + 1}"
            )
        return gpus

    @model_validator(mode="after")
    def _a_gpu_for_each_rank(self) -> ResourcesConfig:
        if self.workers > 1 and 0 < self.gpus_per_worker < 1:
            raise ValueError(
                f"`gpus_per_worker` is {self.gpus_per_worker:g} with {self.workers} workers: NCCL connects no two workers on one GPU; "
                "give each a whole one, or the trial one worker"
            )
        return self

    @property
    def in_process(self) -> bool:
        """Whether a trial trains in the process that Tune starts for it, without Ray Train's workers."""
        return self.workers == 1

    @property
    def possible_workers(self) -> range:
        """Every number of workers a trial may run with."""
        return range(self.min_workers or self.workers, self.workers + 1)
