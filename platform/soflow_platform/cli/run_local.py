"""soflowctl run --local: one trial in the command's own process."""

from __future__ import annotations

import bdb
import sys

from soflow_core.failures import InputError
from soflow_platform.cli.run import find_starts
from soflow_platform.cli.sweep_file import read
from soflow_platform.errors import JobError, UserError
from soflow_platform.storage.project import find_project, require_writable
from soflow_platform.tuning.search_space import Trial


def run_local_command(
    name: str, overrides: tuple[str, ...], trial: str | None, storage_option: str | None
) -> None:
    """Train one trial of a sweep here, and print its losses and scores. Raises JobError where its code raises, after the traceback."""
    sweep = read(name, overrides)
    experiment, planned = sweep.experiment, sweep.trials
    chosen = _chosen(planned, trial)
    project = find_project(storage_option)
    require_writable(project)
    from soflow_platform.training.dataset import check_data
    from soflow_platform.training.failure import Failure
    from soflow_platform.training.in_process import train_locally

    starts = find_starts([chosen], check_data(chosen.experiment), project, experiment)
    print(f"training {chosen.name} in this process; nothing of it is kept", flush=True)
    try:
        train_locally(
            chosen.experiment,
            chosen.name,
            project,
            lambda text: print(text, flush=True),
            starts.get(chosen.name),
        )
    except bdb.BdbQuit:
        raise SystemExit(130) from None
    except (InputError, JobError):
        raise
    except Exception as error:
        failure = Failure.of(error)
        print(failure.traceback, end="", file=sys.stderr)
        raise JobError(f"trial {chosen.name} failed: {failure.sentence}") from error


def _chosen(planned: list[Trial], name: str | None) -> Trial:
    """The first trial, or the one that a name or the beginning of one stands for. Raises UserError where there is none or several."""
    if name is None:
        return planned[0]
    found = [trial for trial in planned if trial.name == name]
    found = found or [trial for trial in planned if trial.name.startswith(name)]
    if len(found) != 1:
        names = ", ".join(trial.name for trial in found or planned)
        reason = f"is the beginning of {len(found)} trials" if found else "is no trial of this sweep"
        raise UserError(f"--trial {name!r} {reason}: choose one of {names}.")
    return found[0]
