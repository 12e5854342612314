"""Plan of a sweep before anything is spent: FLOPs, memory, bytes, GPU-hours, days and money, for a named GPU at a stated utilization.

Everything is arithmetic on the settings, by the model of `training.step_time`; nothing is measured and nothing is built.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from soflow_core.failures import InputError, summarize
from soflow_core.networks import Architecture
from soflow_core.passes import Precision
from soflow_pipelines.preparation.builtin import Expected
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.search import AshaConfig
from soflow_platform.errors import UserError
from soflow_platform.storage.checkpoints import SPLIT_BYTES
from soflow_platform.training.alignment_cost import alignment_cost
from soflow_platform.training.dataset import expected
from soflow_platform.training.memory import WorkerMemory, worker_memory
from soflow_platform.training.model import describe_network
from soflow_platform.training.step_time import (
    FLOAT,
    HOST_COPY,
    Device,
    Fabric,
    Step,
    Work,
    ddp_step,
    decoder_flops,
    feature_flops,
    fsdp_messages,
    fsdp_step,
    stored_bytes,
    work_of,
)
from soflow_platform.tuning.plan_assumptions import GPUS, RESERVE, Assumptions
from soflow_platform.tuning.search_space import Trial


@dataclass(frozen=True)
class TrialPlan:
    """One trial; bytes and seconds are of the whole trial where nothing else is said."""

    name: str
    method: str
    steps: int
    batch: int
    parameters: int
    forward_gmac: float
    """Multiply-accumulates of a forward pass of one sample, in 1e9."""
    forwards: float
    """Cost of training on one image, in forward passes; a backward pass counts as two."""
    image_flops: float
    """To train on one image once."""
    step_flops: float
    total_flops: float
    workers: int
    gpus: float
    step_seconds: float
    scoring_seconds: float
    saving_seconds: float
    memory: WorkerMemory
    """Of one worker."""
    images: int
    """Images that it trains on, repeats counted."""
    data_bytes: float
    """Read from the shards."""
    checkpoint_bytes: float
    """Of one checkpoint."""
    host_copy_bytes: float
    """Of the copy that a checkpoint is written from, in the memory of the first worker's machine, beside what training takes."""
    resume_bytes: float
    """Of that memory, while a trial goes on from a remote checkpoint in parts, which is read to it; 0 for files that are mapped."""
    kept_bytes: float
    """Of the checkpoints that are kept."""
    written_bytes: float
    """Of all checkpoints."""
    network_bytes: float
    """Sent by all workers together."""
    alignment_flops: float = 0.0
    """Of `image_flops`: head and feature network of `training.alignment`."""
    alignment_counted: bool = True
    """Whether these are known."""

    @property
    def hours(self) -> float:
        return (self.steps * self.step_seconds + self.scoring_seconds + self.saving_seconds) / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus


@dataclass(frozen=True)
class SweepPlan:
    """All trials of a sweep under the same assumptions."""

    name: str
    description: str
    assumptions: Assumptions
    trials: list[TrialPlan]
    on_gpus: bool
    """Whether trials ask for GPUs; else times and prices are those of one GPU for each worker."""
    concurrent: int
    """Trials at a time."""
    gpus: float
    """GPUs of the cluster."""
    asha_share: float | None
    """Share of the steps that successive halving leaves, about; None without it."""
    notes: list[str] = field(default_factory=list)
    """What does not fit, and what the plan leaves out."""

    @property
    def gpu_hours(self) -> float:
        """Where every trial runs to its end."""
        return sum(trial.gpu_hours for trial in self.trials)

    @property
    def days(self) -> float:
        """Where every trial runs to its end: trials start as others end, in order."""
        ends = [0.0] * self.concurrent
        for trial in self.trials:
            ends.sort()
            ends[0] += trial.hours
        return max(ends) / 24

    @property
    def price(self) -> float:
        return self.gpu_hours * self.assumptions.hour


def plan_sweep(
    experiment: Experiment,
    trials: Sequence[Trial],
    assumptions: Assumptions,
    data: Expected | None = None,
) -> SweepPlan:
    """The plan of a sweep's trials; `data` is what is known of its samples beside the settings.

    Raises UserError where their shape is not known, or where a trial asks for more than there is.
    """
    planned = [plan_trial(trial, assumptions, data) for trial in trials]
    each = max(trial.gpus for trial in planned)
    gpus = each if assumptions.gpus is None else float(assumptions.gpus)
    if each > gpus:
        raise UserError(
            f"--gpus {assumptions.gpus} is fewer than the {each:g} that one trial asks for (resources.workers): raise it."
        )
    fitting = int(gpus / each)
    concurrent = min(fitting, experiment.resources.concurrent_trials or fitting, len(planned))
    asha = experiment.search.asha
    return SweepPlan(
        experiment.name,
        experiment.description,
        assumptions,
        planned,
        experiment.resources.gpus_per_worker > 0,
        concurrent,
        gpus,
        None if asha is None else asha_share(asha, experiment.training.steps, len(planned)),
        _notes(experiment, planned, assumptions, concurrent * each, gpus),
    )


def plan_trial(trial: Trial, assumptions: Assumptions, data: Expected | None = None) -> TrialPlan:
    """The plan of one trial. Raises UserError where its samples' shape is neither given, nor set, nor that of built-in data."""
    experiment = trial.experiment
    data = data or expected(experiment)
    if data is None:
        raise UserError(
            "data.shape is not set, and the network's cost depends on it: set it, such as --set data.shape=[4,32,32]."
        )
    network = describe_network(experiment, data)
    training, workers = experiment.training, experiment.resources.workers
    precision: Precision = "mixed" if training.precision == "auto" else training.precision
    phases = _phases(trial, network, precision)
    forwards = sum(share * work.executed for share, work in phases)
    work = phases[0][1]
    alignment = alignment_cost(experiment, network)
    image_flops = forwards * work.forward_flops + alignment.image_flops
    steps = [_step(experiment, phase, assumptions.device) for _, phase in phases]
    step_seconds = sum(share * step.total for (share, _), step in zip(phases, steps, strict=True))
    # Features and head are computed in float32, beside the network's passes.
    rate = assumptions.device.tf32 * assumptions.device.utilization
    step_seconds += training.batch / workers * alignment.image_flops / rate
    memory = worker_memory(experiment, network, [(share, phase.passes) for share, phase in phases])
    state = FLOAT * work.parameters
    # Weights, two moments, EMAs; a small state has the first EMA twice, as weights of its own beside it.
    copied = (3 + len(training.ema)) * state
    in_parts = copied >= SPLIT_BYTES
    checkpoint = copied if in_parts else copied + state
    checkpoints = math.ceil(training.steps / (training.checkpoint_every or experiment.evaluation.every))
    kept = min(training.keep_checkpoints + 1, checkpoints)
    place = training.checkpoints or ""
    remote = "://" in place and not place.startswith("file://")
    images = training.steps * training.batch
    return TrialPlan(
        name=trial.name,
        method=experiment.objective.method,
        steps=training.steps,
        batch=training.batch,
        parameters=work.parameters,
        forward_gmac=work.forward_flops / 2e9,
        forwards=forwards,
        image_flops=image_flops,
        step_flops=image_flops * training.batch,
        total_flops=image_flops * images,
        workers=workers,
        gpus=workers * (experiment.resources.gpus_per_worker or 1),
        step_seconds=step_seconds,
        scoring_seconds=_scoring_seconds(experiment, data.shape, work, assumptions.device),
        saving_seconds=checkpoints * copied / HOST_COPY,
        memory=memory,
        images=images,
        data_bytes=images * stored_bytes(data.shape, latents=_latents(experiment, data.shape)),
        checkpoint_bytes=checkpoint,
        host_copy_bytes=copied,
        resume_bytes=copied if remote and in_parts else 0.0,
        kept_bytes=kept * checkpoint,
        written_bytes=checkpoints * checkpoint,
        network_bytes=training.steps
        * workers
        * statistics.fmean(_sent_bytes(experiment, phase) for _, phase in phases),
        alignment_flops=alignment.image_flops,
        alignment_counted=alignment.counted,
    )


def _phases(trial: Trial, network: Architecture, precision: Precision) -> list[tuple[float, Work]]:
    """The work of a step in each phase. Raises UserError where the method's passes cannot be counted."""
    experiment = trial.experiment
    method, batch, conditional = experiment.objective, experiment.training.batch, experiment.data.conditional
    try:
        recompute = experiment.training.recompute
        phases = work_of(network, method, precision, batch, conditional, recompute)
    except InputError:
        raise
    except Exception as error:
        raise UserError(
            f"trial {trial.name}: the passes of {method.method} cannot be counted, because its loss raises {summarize(error)}"
        ) from error
    if not all(any(each.gradient for each in work.passes) for _, work in phases):
        raise UserError(f"trial {trial.name}: {method.method} makes no pass of the network with a gradient.")
    return phases


def _step(experiment: Experiment, work: Work, device: Device) -> Step:
    training, workers = experiment.training, experiment.resources.workers
    model = fsdp_step if training.parallel == "fsdp" else ddp_step
    return model(work, device, Fabric("400 Gb/s for each GPU"), workers, training.batch)


def _sent_bytes(experiment: Experiment, work: Work) -> float:
    """Bytes that one worker sends in a step: a ring all-reduce of the gradients, or FSDP's gathers and its reduce-scatter."""
    workers = experiment.resources.workers
    messages = 2 if experiment.training.parallel == "ddp" else sum(fsdp_messages(work))
    return messages * (workers - 1) / workers * work.gradient_bytes


def _latents(experiment: Experiment, shape: tuple[int, ...]) -> bool:
    """Whether samples are latents: an autoencoder is named, or there are more channels than an image has."""
    return experiment.data.autoencoder is not None or shape[0] > 3


def _scoring_seconds(experiment: Experiment, shape: tuple[int, ...], work: Work, device: Device) -> float:
    """Of all evaluations: sampling at each NFE, decoding latents for features of images, and the features, in TF32."""
    evaluation, training = experiment.evaluation, experiment.training
    image = sum(evaluation.nfe) * work.forward_flops
    of_images = evaluation.features != "pooled"
    if of_images:
        decoding = decoder_flops(shape) if _latents(experiment, shape) else 0.0
        image += len(evaluation.nfe) * (decoding + feature_flops(evaluation.features))
    times = math.ceil(training.steps / evaluation.every)
    seconds = evaluation.samples * image / (device.tf32 * device.utilization)
    return times * seconds / experiment.resources.workers


def asha_share(asha: AshaConfig, steps: int, trials: int) -> float:
    """Share of all steps that are trained where each rung lets one trial in `reduction` go on.

    Rungs are asynchronous: the first trials go on before there are others to compare with, so that somewhat more is trained.
    """
    rung, going_on, trained, done = asha.first_rung, float(trials), 0.0, 0
    while rung < steps:
        trained += going_on * (rung - done)
        going_on, done, rung = max(1.0, going_on / asha.reduction), rung, rung * asha.reduction
    return (trained + going_on * (steps - done)) / (trials * steps)


def _notes(
    experiment: Experiment, planned: list[TrialPlan], assumptions: Assumptions, busy: float, gpus: float
) -> list[str]:
    notes = []
    largest = max(planned, key=lambda trial: trial.memory.total)
    room = RESERVE * GPUS[assumptions.gpu].memory
    if largest.memory.total > room:
        notes.append(_too_large(experiment, largest, room, assumptions.gpu))
    if busy < gpus:
        notes.append(
            f"{gpus - busy:g} of {gpus:g} GPUs have nothing to do: {len(planned)} trial(s), "
            f"{busy:g} GPUs at a time (resources.workers, resources.concurrent_trials)."
        )
    added = experiment.search.added
    if added:
        each = sum(trial.gpu_hours for trial in planned) / len(planned)
        notes.append(
            f"up to {added} more trials come from results (search.algorithm, search.final) and are in no sum above: some "
            f"{added * each:,.3g} GPU-hours."
        )
    if not largest.alignment_counted:
        notes.append("training.alignment is not counted: how large its feature network is is not known here.")
    notes += _rung_notes(experiment, len(planned))
    if largest.memory.activations is None:
        notes.append("activations are not counted for this kind of network.")
    return notes


def _rung_notes(experiment: Experiment, trials: int) -> list[str]:
    """What is to be known of a scheduler that compares trials before their last step."""
    search, notes = experiment.search, []
    rung, _ = experiment.rung_metric
    if rung != search.metric:
        notes.append(f"trials are compared by {rung} at rungs, and by {search.metric} in the end.")
    if search.pbt is not None:
        count = len(range(search.pbt.every, experiment.training.steps, search.pbt.every))
        notes.append(
            f"all {trials} trials wait for each other at {count} rung(s), each {search.pbt.every:,} steps, where their processes start "
            "again (search.pbt): this is in no time above."
        )
    return notes


def _too_large(experiment: Experiment, trial: TrialPlan, room: float, gpu: str) -> str:
    """What does not fit, and the smallest `training.accumulate` with which it does."""
    memory, training = trial.memory, experiment.training
    activations = memory.activations or 0.0
    left = room - (memory.total - activations)
    says = (
        f"{trial.name} takes {memory.total / 1e9:,.0f} GB and an {gpu} has {room / 1e9:,.0f} GB for tensors"
    )
    rows = training.batch // (experiment.resources.workers * training.accumulate)
    for pieces in range(2, rows + 1):
        if rows % pieces == 0 and activations / pieces <= left:
            return f"{says}: set training.accumulate to {pieces * training.accumulate}, or raise resources.workers."
    return f"{says}: set training.parallel to fsdp with more workers, or plan for a GPU with more memory."
