"""A sweep file as commands read it: found by path or name, checked, with its trials."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from soflow_platform.config.document import Document, apply_override, read_document
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.presets import find_sweep
from soflow_platform.config.proxy import as_proxy
from soflow_platform.config.validation import read_experiment, validate, where_written
from soflow_platform.errors import UserError
from soflow_platform.tuning.search_space import Trial, trials


@dataclass(frozen=True)
class CheckedSweep:
    """A sweep file that was read and checked, with its trials."""

    path: Path
    document: Document
    experiment: Experiment
    trials: list[Trial]
    left_out: list[str] = field(default_factory=list)
    """With a proxy: in what its trials differ from the sweep's own, each a sentence."""


def read(name: str, overrides: tuple[str, ...], proxy: str | None = None) -> CheckedSweep:
    """A sweep file, checked, with its trials; `proxy` names another, at whose size and length it is meant.

    Raises UserError naming the first thing that is wrong.
    """
    path = find_sweep(name)
    left_out: list[str] = []
    if proxy is None:
        experiment, document = read_experiment(path, overrides)
    else:
        stand_in = as_proxy(read_document(path), read_document(find_sweep(proxy)), proxy)
        document, left_out = stand_in.document, stand_in.left_out
        for override in overrides:
            apply_override(document, override)
        experiment = validate(document)
    planned = trials(document, experiment)
    try:
        _check_networks(planned)
    except UserError as error:
        origin = where_written(document, str(error))
        raise UserError(f"{origin}: {error}" if origin else str(error)) from None
    return CheckedSweep(path, document, experiment, planned, left_out)


def print_proxy(sweep: CheckedSweep, proxy: str | None) -> None:
    """Print on stderr what a proxy leaves out of a sweep."""
    for sentence in sweep.left_out:
        print(f"proxy {proxy}: {sentence}.", file=sys.stderr)


def steps_of(planned: list[Trial]) -> str:
    """Steps of the trials: `600`, or `492 to 900`."""
    steps = [trial.experiment.training.steps for trial in planned]
    return f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,} to {max(steps):,}"


def later_trials(experiment: Experiment) -> str:
    """`, and up to 8 more from results,` where the search algorithm or `search.final` adds trials."""
    added = experiment.search.added
    return f", and up to {added} more from results," if added else ""


def compared_by(experiment: Experiment) -> str:
    """`compared by eval/fid_nfe1 (min), at rungs by eval/fd_nfe1 (min)`."""
    text = f"compared by {experiment.search.metric} ({experiment.mode})"
    rung, mode = experiment.rung_metric
    return text if rung == experiment.search.metric else f"{text}, at rungs by {rung} ({mode})"


def _check_networks(planned: list[Trial]) -> None:
    """Raises UserError where a trial's network cannot take the shape that the file names."""
    from soflow_platform.training.dataset import expected
    from soflow_platform.training.model import describe_network

    for trial in planned:
        data = expected(trial.experiment)
        config = None if data is None else describe_network(trial.experiment, data)
        if trial.experiment.training.start_from is not None:
            from soflow_platform.training.start import check_start_file

            check_start_file(trial.experiment, config)
