"""A population from rung to rung: who goes on from whom, the same after any interruption, and reproduced by one training.

Trials are trained in this process; tests/end_to_end/test_population.py has them under Ray.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soflow_platform.config.document import Document, apply_override, read_document
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.validation import validate
from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking
from soflow_platform.tuning.context import SweepContext
from soflow_platform.tuning.display import Display
from soflow_platform.tuning.population_run import PopulationRun
from soflow_platform.tuning.record import SweepRecord, load_record, new_or_resumed_record
from soflow_platform.tuning.recorded import known_trials, trials_of_record
from soflow_platform.tuning.search_space import Trial, trials
from tests.platform.conftest import ROOT, SMALL
from tests.support.trained_state import differing_tensors, final_state
from tests.support.trained_trials import trainer_of

SWEEP = "digits-population"
POPULATION = (
    "search={algorithm: random, trials: 4, metric: eval/fd_nfe1, pbt: {every: 2}, space: "
    "{optimizer.lr: {log_uniform: [1e-3, 1e-1]}, objective.weight_power: {uniform: [0, 1]}}}"
)


class Killed(BaseException):
    """Stands for the end of the driver's process."""


class Sweep:
    """The sweep as its driver has it, started anew from the files of its project folder."""

    def __init__(self, storage: ProjectFolder, tracking: Tracking) -> None:
        self.storage, self.tracking = storage, tracking
        self.document: Document = read_document(ROOT / "sweeps" / "digits.yaml")
        for setting in (*SMALL, POPULATION):
            apply_override(self.document, setting)
        self.experiment = validate(self.document)
        existing = load_record(storage, SWEEP)
        planned = trials(self.document, self.experiment)
        if existing is not None:
            planned = known_trials(self.document, self.experiment, existing, planned)
        self.record = new_or_resumed_record(existing, SWEEP, "digits.yaml", self.experiment, planned)
        self.record.attempts += 1
        self.record.save(storage)
        self.planned = planned
        self.noted: list[str] = []

    def train(self, before: Callable[[list[Trial], int], None] = lambda *_: None) -> dict[str, str]:
        """Train the population in this process; `before` is called before trials are trained to a step."""

        def train_to(trials: list[Trial], step: int) -> dict[str, str]:
            before(trials, step)
            for trial in trials:
                self.train_one(trial, step)
            return {}

        context = SweepContext(
            self.record, self.experiment, self.planned, self.storage, Display(), self.document
        )
        return PopulationRun(context, train_to, self.noted.append).train()

    def train_one(self, trial: Trial, step: int) -> None:
        recipe = Experiment(**self.record.recipe(trial.name)) if self.record.rungs else trial.experiment
        trainer_of(self.storage, self.tracking, recipe, SWEEP, trial.name, until=step).run()

    def store(self, trial: str) -> CheckpointStore:
        return self.record.checkpoints(self.storage, trial)


@pytest.fixture(scope="module")
def through(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path
) -> tuple[ProjectFolder, Tracking, SweepRecord]:
    """A population that was never interrupted. Tests read it, and train beside it."""
    storage = ProjectFolder(tmp_path_factory.mktemp("population") / "runs")
    storage.root.mkdir()
    shutil.copy(empty_store, storage.root)
    torch.set_num_threads(1)
    sweep = Sweep(storage, tracking := Tracking.open(storage.tracking_uri, "digits", storage))
    assert sweep.train() == {}
    return storage, tracking, sweep.record


def test_the_worse_trials_go_on_from_the_better_ones(
    through: tuple[ProjectFolder, Tracking, SweepRecord],
) -> None:
    storage, _, record = through
    stored = load_record(storage, SWEEP)
    assert stored is not None
    assert stored.rungs == record.rungs
    assert [(rung.step, len(rung.scores), len(rung.replaced)) for rung in record.rungs] == [
        (2, 4, 1),
        (4, 4, 1),
    ]
    for rung in record.rungs:
        (replacement,) = rung.replaced
        assert rung.scores[replacement.source] == min(rung.scores.values())
        assert rung.scores[replacement.trial] == max(rung.scores.values())
        assert replacement.after != record.history(replacement.source)[0].settings
        log = (storage.trial(SWEEP, replacement.trial) / "log.txt").read_text()
        assert f"goes on from {replacement.source}" in log
    for trial in record.trials:
        newest, _ = record.checkpoints(storage, trial.name).newest()
        assert newest is not None
        assert newest.state.step == 6
        assert newest.state.images == 48
    last = record.rungs[-1].replaced[0]
    steps = [c.state.step for c in record.checkpoints(storage, last.trial).published()]
    assert steps == [4, 6], "what it trained before it was replaced leads to none of its weights"
    newest, _ = record.checkpoints(storage, last.trial).newest()
    assert newest is not None
    assert [each["step"] for each in newest.state.evaluations] == [4, 6]
    assert newest.state.evaluations[0]["eval/fd_nfe1"] == record.rungs[-1].scores[last.source]


def test_a_trial_of_a_population_is_reproduced_by_one_training(
    through: tuple[ProjectFolder, Tracking, SweepRecord],
) -> None:
    storage, tracking, record = through
    last = record.rungs[-1].replaced[0].trial
    experiment = next(trial.experiment for trial in trials_of_record(record) if trial.name == last)
    assert experiment.training.changes
    again = trainer_of(storage, tracking, Experiment(**experiment.resolved()), SWEEP, "again")
    again.run()
    roots = [str(record.checkpoints(storage, last).root), str(again.setup.checkpoints.root)]
    assert differing_tensors(final_state(roots[0]), final_state(roots[1])) == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in training", "decided", "copied", "lost"])
def test_a_population_that_was_cut_goes_on_as_if_it_had_not_been(
    through: tuple[ProjectFolder, Tracking, SweepRecord],
    storage: ProjectFolder,
    tracking: Tracking,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """`lost`: after the copy was decided, the checkpoint to be copied is gone, and the trial is trained through its whole lineage."""
    cut = Sweep(storage, tracking)

    def kill(*_: object) -> None:
        raise Killed

    def before(trials: list[Trial], step: int) -> None:
        if step == 4 and moment in ("in training", "copied"):
            if moment == "in training":
                cut.train_one(trials[0], step)
            raise Killed

    if moment in ("decided", "lost"):
        monkeypatch.setattr(PopulationRun, "_apply", kill)
    with pytest.raises(Killed):
        cut.train(before)
    monkeypatch.undo()
    if moment == "lost":
        source = cut.record.rungs[0].replaced[0].source
        shutil.rmtree(Path(cut.store(source).root))
    again = Sweep(storage, tracking)
    torch.set_num_threads(1)
    assert again.train() == {}
    _, _, record = through
    assert again.record.rungs == record.rungs
    for trial in record.trials:
        roots = [
            str(each.checkpoints(place, trial.name).root)
            for place, each in ((through[0], record), (storage, again.record))
        ]
        assert differing_tensors(final_state(roots[0]), final_state(roots[1])) == []


def test_a_trial_that_fails_by_another_fault_stops_the_population_at_its_rung(
    storage: ProjectFolder, tracking: Tracking
) -> None:
    sweep = Sweep(storage, tracking)
    context = SweepContext(sweep.record, sweep.experiment, sweep.planned, storage, Display(), sweep.document)
    asked: list[tuple[int, int]] = []

    def train_to(trials: list[Trial], step: int) -> dict[str, str]:
        asked.append((len(trials), step))
        for trial in trials[1:]:
            sweep.train_one(trial, step)
        return {trials[0].name: "its machine was lost"}

    failures = PopulationRun(context, train_to, sweep.noted.append).train()
    assert failures == {sweep.planned[0].name: "its machine was lost"}
    assert asked == [(4, 2)]
    assert sweep.record.rungs == []
