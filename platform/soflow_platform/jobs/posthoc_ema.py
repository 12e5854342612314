"""`soflowctl ema`: averages of a trial's weights over lengths that are chosen after training (arXiv 2312.02696, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from soflow_core.ema import combine, posthoc_residual, posthoc_weights
from soflow_core.weights import load_weights, read_header, save_weights
from soflow_pipelines.storage.object_store import StorageError
from soflow_platform.errors import UserError
from soflow_platform.jobs.evaluate import Score, Services, score_target
from soflow_platform.jobs.requests import EvaluateRequest, SamplingRequest
from soflow_platform.registry.versions import NewVersion, describe_weights, register_weights
from soflow_platform.storage.checkpoints import Checkpoint
from soflow_platform.storage.ema_snapshots import snapshot_store, widths_of
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import STEP_TAG, SWEEP_TAG, TRIAL_TAG, Tracking
from soflow_platform.tuning.lookup import resolve
from soflow_platform.tuning.record import SweepRecord

LENGTH_TAG = "soflow.ema_length"


@dataclass(frozen=True)
class EmaRequest:
    """Request of `soflowctl ema`."""

    trial: str
    """SWEEP/TRIAL, or a sweep for its best trial."""
    lengths: tuple[float, ...]
    """Relative widths of the averages: standard deviation of the profile over the length of training."""
    step: int | None = None
    """Step at which the averages end; None: the last one with a snapshot."""
    out: Path | None = None
    """Folder for the weights. None: that of the trial's snapshots, or of the trial where these are remote."""


@dataclass(frozen=True)
class Average:
    """A reconstructed average."""

    weights: Path
    sweep: str
    trial: str
    step: int
    images: int
    length: float
    residual: float
    """Norm of what the snapshots' profiles leave of the profile that was asked for, over the norm of that profile."""
    snapshots: int
    data: str | None = None
    """Training data as the sweep named them, which its images are compared with."""


def reconstruct(request: EmaRequest, project: ProjectFolder) -> list[Average]:
    """Write the weights of each length to a file.

    Raises UserError where the trial has no snapshots, or a length or step is impossible, and for a snapshot that is damaged.
    """
    for length in request.lengths:
        if not 0 < length < 0.28:
            raise UserError(
                f"--length {length:g} is not above 0 and below 0.28, which no power function has; EDM2's are 0.05 and 0.1."
            )
    record, trial = _trial(request.trial, project)
    found = _snapshots(record, trial, project)
    last = request.step or found[-1].state.step
    used = [snapshot for snapshot in found if snapshot.state.step <= last]
    if not used or used[-1].state.step != last:
        steps = ", ".join(f"{snapshot.state.step:,}" for snapshot in found)
        raise UserError(f"--step {last}: trial {trial} has no snapshot of that step; it has {steps}.")
    folder = request.out or project.trial(record.id, trial) / "ema"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        averages = [_average(used, length, folder, record.id, trial) for length in request.lengths]
    except StorageError as error:
        raise UserError(str(error)) from error
    return [replace(average, data=record.experiment["data"].get("source")) for average in averages]


def _trial(name: str, project: ProjectFolder) -> tuple[SweepRecord, str]:
    ref = resolve(project, name)
    trial = ref.trial or (ref.record.best.trial if ref.record.best else None)
    if trial is None:
        raise UserError(f"{ref} has no best trial yet: name one of its trials, as {ref.record.id}/TRIAL.")
    return ref.record, trial


def _snapshots(record: SweepRecord, trial: str, project: ProjectFolder) -> list[Checkpoint]:
    base = record.experiment["training"].get("checkpoints")
    found = [each for each in snapshot_store(project, record.id, trial, base).published() if widths_of(each)]
    if not found:
        raise UserError(
            f"trial {trial} of sweep {record.id} has no snapshots of power-function averages: set training.ema_profiles, such as "
            "[0.05, 0.1], and train it."
        )
    return found


def _average(used: Sequence[Checkpoint], length: float, folder: Path, sweep: str, trial: str) -> Average:
    kept = [(each, width, file) for each in used for width, file in widths_of(each).items()]
    stored = [(each.state.step, width) for each, width, _ in kept]
    last = used[-1].state
    target = (last.step, length)
    coefficients = posthoc_weights(stored, target)

    def tensors() -> Iterator[dict[str, Tensor]]:
        for each, _, file in kept:
            with each.opened(file) as path:
                yield load_weights(path).tensors

    with used[-1].opened(kept[-1][2]) as path:
        header, _ = read_header(path)
    assert header.objective is not None, "snapshots are written with their method"
    out = folder / f"length-{length:g}-step-{last.step:08d}.safetensors"
    save_weights(out, combine(tensors(), coefficients), header.network_config, header.objective, header.data)
    residual = posthoc_residual(stored, target, coefficients)
    return Average(out, sweep, trial, last.step, last.images, length, residual, len(used))


def score_averages(
    averages: Sequence[Average], images: int, sampling: SamplingRequest, services: Services
) -> list[Score]:
    """The scores of every average in every way of sampling, all on the same noise; the tag `ema_length` tells averages apart."""
    scores = []
    for average in averages:
        request = EvaluateRequest(str(average.weights), images, sampling)
        # A file alone tells of no data.
        target = replace(services.resolver.find(request.target), data=average.data)
        found = score_target(target, request, services)
        named = {"ema_length": f"{average.length:g}"}
        scores += [replace(score, name=average.trial, tags={**score.tags, **named}) for score in found]
    return scores


def register_average(average: Average, model: str, tracking: Tracking) -> str:
    """Register a reconstructed average as a version, with alias `candidate`. Returns the version."""
    run = tracking.find(average.sweep, average.trial)
    inherited = run.data.tags if run else {}
    origin = {
        "sweep": average.sweep,
        "trial": average.trial,
        "step": average.step,
        "images": average.images,
        "ema_length": average.length,
    }
    tags = {
        SWEEP_TAG: average.sweep,
        TRIAL_TAG: average.trial,
        STEP_TAG: str(average.step),
        LENGTH_TAG: f"{average.length:g}",
        **{key: value for key, value in inherited.items() if key.startswith(("data.", "start."))},
    }
    description = describe_weights(average.weights, origin, {"metrics": {}, "settings": {}})
    new = NewVersion(
        model, average.weights, description, tags, run=run.info.run_id if run else None, step=average.step
    )
    return register_weights(tracking, new)
