"""Settings of the training loop and of the machines it runs on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from soflow_platform.config.sections import Positive, Section


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


class ResourcesConfig(Section):
    """What one trial asks the cluster for."""

    workers: Positive = 1
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    concurrent_trials: Positive | None = None
    """Trials that run at the same time; None: as many as fit."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Lost workers or nodes that one trial survives."""
