"""The trials of a sweep as its record has them, and those that its file has beyond them.

A trial is known again by the settings that decide its weights, so that a file with another value, method or seed goes on with the
sweep that has trained the others. Trials that are in a record keep their names and their order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from soflow_core.failures import InputError
from soflow_platform.config.document import Document
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import UserError
from soflow_platform.storage.code_digest import running_code
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import RECORD, SweepRecord, TrialEntry, load_record
from soflow_platform.tuning.search_space import Phase, Trial, recorded_trial

NUMBER = re.compile(r"trial-(\d+)")


@dataclass(frozen=True)
class Grown:
    """A sweep of whose trials a file has all, and perhaps more."""

    record: SweepRecord
    other_code: tuple[str, ...]
    """Source files of the code that trained it which are others now."""


def known_trials(
    document: Document, experiment: Experiment, record: SweepRecord, planned: Sequence[Trial]
) -> list[Trial]:
    """Every trial of a sweep that goes on: those of its record, in order and by their names, then those that only the file has.

    `planned` are those of the file. Raises UserError where a trial of the record is none of the file's any longer, and the file's
    settings do not make it again.
    """
    left = list(planned)
    digests = {trial.name: trial.experiment.training_digest() for trial in planned}
    found: list[Trial] = []
    for position, entry in enumerate(record.trials):
        index = _number(entry, position)
        if phase_of(entry) != "listed":
            found.append(_made_again(document, experiment, record, entry, index))
            continue
        digest, at_place = _digest(record, entry), planned[position : position + 1]
        candidates = [
            *(trial for trial in left if digests[trial.name] == digest),
            *(trial for trial in left if trial.name == entry.name),
            # Names are formed otherwise than in earlier versions, whose digests this one may not compute.
            *(trial for trial in at_place if trial in left and _same_settings(trial, entry)),
        ]
        if not candidates:
            found.append(_made_again(document, experiment, record, entry, index))
            continue
        left.remove(candidates[0])
        found.append(replace(candidates[0], index=index, name=entry.name))
    following = max((trial.index for trial in found), default=-1) + 1
    return found + [_renumbered(trial, index) for index, trial in enumerate(left, start=following)]


def _same_settings(trial: Trial, entry: TrialEntry) -> bool:
    """Whether a trial has the varied settings of a recorded one, as JSON keeps them."""
    return json.dumps(trial.settings) == json.dumps(entry.settings)


def grown_sweep(project: ProjectFolder, experiment: Experiment, planned: Sequence[Trial]) -> Grown | None:
    """The sweep that these trials continue: of the same name, scored alike, with no listed trial that is not among them.

    Of several the one with the most trials, then the newest. None where there is none, and for a population, which is compared from its
    first rung on.
    """
    if experiment.search.pbt is not None:
        return None
    scoring = experiment.scoring_digest()
    digests = {trial.experiment.training_digest() for trial in planned}
    best: SweepRecord | None = None
    for record in records_of(project, experiment.name):
        if not record.trials or not record.attempts or (best is not None and not _better(record, best)):
            continue
        with suppress(InputError, ValueError, TypeError, KeyError):
            # What this version cannot read is another sweep.
            if Experiment(**record.experiment).scoring_digest() != scoring:
                continue
            listed = [entry for entry in record.trials if phase_of(entry) == "listed"]
            if listed and all(_digest(record, entry) in digests for entry in listed):
                best = record
    if best is None:
        return None
    return Grown(best, tuple(best.other_files(project, running_code())))


def sweep_of(
    project: ProjectFolder, experiment: Experiment, planned: Sequence[Trial], sweep: str
) -> SweepRecord | None:
    """The record of the sweep with this id; where there is none, of the sweep that has exactly these trials under another."""
    record = load_record(project, sweep)
    if record is not None:
        return record
    grown = grown_sweep(project, experiment, planned)
    if grown is None:
        return None
    listed = [entry for entry in grown.record.trials if phase_of(entry) == "listed"]
    return grown.record if len(listed) == len(planned) else None


def phase_of(entry: TrialEntry) -> Phase:
    """How the trial of an entry came into its sweep."""
    phases: dict[str | None, Phase] = {"drawn": "drawn", "final": "final"}
    return phases.get(entry.phase, "listed")


def trials_of_record(record: SweepRecord) -> list[Trial]:
    """The trials of a sweep as they were recorded, those that results have led to included."""
    budgets = Experiment(**record.experiment).search.budgets
    found = []
    for index, entry in enumerate(record.trials):
        experiment = Experiment(**record.recipe(entry.name))
        of = entry.settings.get("budget")
        own = tuple(budget for budget in budgets if budget in of.split(", ")) if of else budgets
        found.append(Trial(index, entry.name, entry.settings, experiment, own, phase_of(entry)))
    return found


def records_of(project: ProjectFolder, name: str) -> list[SweepRecord]:
    """The sweeps of this name whose records can be read."""
    found = []
    for path in sorted(project.sweeps.glob(f"{name}-*/{RECORD}")):
        with suppress(InputError, OSError):
            record = load_record(project, path.parent.name)
            if record is not None and record.name == name:
                found.append(record)
    return found


def _better(record: SweepRecord, other: SweepRecord) -> bool:
    return (len(record.trials), record.created) > (len(other.trials), other.created)


def _digest(record: SweepRecord, entry: TrialEntry) -> str | None:
    """The training digest of a recorded trial; None where this version cannot read its settings."""
    try:
        return Experiment(**record.planned(entry.name)).training_digest()
    except (InputError, ValueError, TypeError, KeyError):
        return None


def _made_again(
    document: Document, experiment: Experiment, record: SweepRecord, entry: TrialEntry, index: int
) -> Trial:
    """A recorded trial that the file does not list, from its settings in place of the file's."""
    trial = recorded_trial(document, experiment, index, entry.name, entry.settings, phase_of(entry))
    before = _digest(record, entry)
    if before is not None and trial.experiment.training_digest() != before:
        raise UserError(
            f"trial {entry.name} of sweep {record.id} has other settings than this file gives it: go on with the file that has it "
            f"({record.file}), or give this one another name."
        )
    return trial


def _number(entry: TrialEntry, position: int) -> int:
    match = NUMBER.match(entry.name)
    return position if match is None else int(match[1])


def _renumbered(trial: Trial, index: int) -> Trial:
    name = f"trial-{index:02d}{trial.name.removeprefix(f'trial-{trial.index:02d}')}"
    return replace(trial, index=index, name=name)


def awaits_results(experiment: Experiment, trials: Sequence[Trial]) -> bool:
    """Whether trials that results lead to are still to be drawn or chosen."""
    phases = [trial.phase for trial in trials]
    return phases.count("drawn") < experiment.search.drawn or (
        experiment.search.final is not None and "final" not in phases
    )


def describe_growth(record: SweepRecord, trials: Sequence[Trial]) -> str | None:
    """A sentence on what a file adds to a sweep that was started; None where that is nothing."""
    names = {entry.name for entry in record.trials}
    added = [trial.name for trial in trials if trial.name not in names]
    if not added:
        return None
    listed = ", ".join(added[:3]) + (f" and {len(added) - 3} more" if len(added) > 3 else "")
    return (
        f"sweep {record.id} grows by {len(added)} trial(s): {listed}; the {len(names)} that it has are kept"
    )
