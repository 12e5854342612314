"""The trials of a sweep as its record has them."""

from __future__ import annotations

from collections.abc import Sequence

from soflow_platform.config.document import Document
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import UserError
from soflow_platform.tuning.record import SweepRecord, TrialEntry
from soflow_platform.tuning.search_space import Phase, Trial, added_trial


def recorded_trials(
    document: Document, experiment: Experiment, record: SweepRecord, planned: Sequence[Trial]
) -> list[Trial]:
    """The trials of a record that results have led to; `planned` are those of the file.

    Raises UserError where one is not as it was recorded, which takes a change of the program.
    """
    found = list(planned)
    for entry in record.trials:
        phase = phase_of(entry)
        if phase != "listed":
            trial = added_trial(document, experiment, len(found), entry.settings, phase)
            if trial.name != entry.name:
                raise UserError(
                    f"trial {entry.name} of sweep {record.id} is {trial.name} now: go on with the version of soflow that began it."
                )
            found.append(trial)
    return found[len(planned) :]


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
