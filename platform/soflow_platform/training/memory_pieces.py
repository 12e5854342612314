"""A trial whose memory is exhausted goes on with smaller pieces of the same batch: `training.accumulate` is doubled, and kept."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace

from soflow_core.failures import InputError
from soflow_pipelines.storage.files import write_json
from soflow_platform.config.experiment import Experiment
from soflow_platform.storage.records import read_record
from soflow_platform.training.job import TrialJob
from soflow_platform.training.trial_log import LOG, TrialLog

PIECES = "pieces.json"
"""Name of the file in a trial's folder with the pieces that its memory made necessary."""


@dataclass(frozen=True)
class Pieces:
    """Pieces in which a worker takes its samples of a step."""

    accumulate: int
    batch: int
    """The batch that they were found for."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left."""
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)


def with_pieces(job: TrialJob) -> TrialJob:
    """The job with the pieces that an earlier start of the trial has found necessary."""
    found = None
    with contextlib.suppress(OSError, InputError):
        found = read_record(job.folder / PIECES, Pieces)
    experiment = Experiment(**job.experiment)
    if found is None or found.batch != experiment.training.batch:
        return job
    if found.accumulate <= experiment.training.accumulate:
        return job
    return _taken_in(job, experiment, found.accumulate) or job


def with_more_pieces(job: TrialJob, error: BaseException) -> TrialJob | None:
    """The job in twice as many pieces where `error` is that of a device without memory, noted in the trial's folder and log.

    None for another error, and where the batch has no such pieces.
    """
    if not is_out_of_memory(error):
        return None
    experiment = Experiment(**job.experiment)
    count = 2 * experiment.training.accumulate
    smaller = _taken_in(job, experiment, count)
    if smaller is None:
        return None
    samples = experiment.training.batch // experiment.resources.workers
    text = (
        f"out of memory: it goes on with each worker's {samples} samples of a step in {count} pieces (training.accumulate); "
        "batch and gradients are the same"
    )
    try:
        write_json(job.folder / PIECES, vars(Pieces(count, experiment.training.batch)))
        TrialLog(job.folder / LOG).write(text)
    except OSError as problem:
        logging.getLogger(__name__).warning("%s: %s (it cannot be noted: %s)", job.trial, text, problem)
    return smaller


def _taken_in(job: TrialJob, experiment: Experiment, count: int) -> TrialJob | None:
    """The job with so many pieces; None where the batch does not divide into them."""
    training = {**job.experiment["training"], "accumulate": count}
    try:
        # The whole is checked: other settings decide how many pieces there can be.
        changed = Experiment(**{**experiment.resolved(), "training": training})
    except ValueError:
        return None
    return replace(job, experiment=changed.resolved())
