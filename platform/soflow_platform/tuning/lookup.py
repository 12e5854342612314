"""Finds the sweep or trial of a project folder that a name or the beginning of one stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from soflow_platform.errors import UserError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import SweepRecord, all_records

LISTED = 8
"""Candidates that an error names."""


@dataclass(frozen=True)
class SweepRef:
    """A sweep, or one trial of it."""

    record: SweepRecord
    trial: str | None = None

    @property
    def trials(self) -> list[str]:
        """The trial, or all of the sweep, in order."""
        return [self.trial] if self.trial else trial_names(self.record)

    def __str__(self) -> str:
        return f"trial {self.trial} of sweep {self.record.id}" if self.trial else f"sweep {self.record.id}"


def trial_names(record: SweepRecord) -> list[str]:
    """The trials of a sweep, in order."""
    return [trial.name for trial in record.trials]


def resolve(storage: ProjectFolder, name: str) -> SweepRef:
    """The sweep or trial that `name` stands for.

    A sweep is named by its id, by a beginning that no other id has, or by its file's name where it ran once; a trial of the newest
    sweep by its name or such a beginning, one of another sweep as SWEEP/TRIAL. Raises UserError, with the candidates, for a name
    that is unknown or stands for several.
    """
    records = all_records(storage)
    if not records:
        raise UserError(
            f"there is no sweep {name!r} under {storage.root}, which holds none: start one with `soflowctl run`."
        )
    sweep, slash, trial = name.partition("/")
    if slash:
        record = _sweep(records, sweep, storage)
        return SweepRef(record, _trial(record, trial))
    newest = records[0]
    exact = [r for r in records if r.id == name] or [r for r in records if r.name == name]
    if len(exact) == 1:
        return SweepRef(exact[0])
    if not exact and name in trial_names(newest):
        return SweepRef(newest, name)
    found = [SweepRef(r) for r in exact or _beginning(records, name)]
    if not exact:
        found += [SweepRef(newest, t) for t in trial_names(newest) if t.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name!r} is the name of {len(found)}: {_listed([_short(f) for f in found])}.")
    raise UserError(
        f"there is no sweep or trial {name!r} under {storage.root}; sweeps are {_listed([r.id for r in records])}; "
        f"trials of {newest.id} are {_listed(trial_names(newest))}."
    )


def _sweep(records: list[SweepRecord], name: str, storage: ProjectFolder) -> SweepRecord:
    exact = [r for r in records if r.id == name] or [r for r in records if r.name == name]
    found = exact or _beginning(records, name)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name!r} is the name of {len(found)} sweeps: {_listed([r.id for r in found])}.")
    raise UserError(
        f"there is no sweep {name!r} under {storage.root}; there are {_listed([r.id for r in records])}."
    )


def _trial(record: SweepRecord, name: str) -> str:
    names = trial_names(record)
    found = [name] if name in names else [t for t in names if t.startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{name!r} is the name of {len(found)} trials of {record.id}: {_listed(found)}.")
    raise UserError(f"sweep {record.id} has no trial {name!r}; it has {_listed(names)}.")


def _beginning(records: list[SweepRecord], name: str) -> list[SweepRecord]:
    return [r for r in records if name and r.id.startswith(name)]


def _short(found: SweepRef) -> str:
    return f"{found.record.id}/{found.trial}" if found.trial else found.record.id


def _listed(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
