"""The alias `candidate` moves to what a sweep registers only where that is better and was scored in the same way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from soflow_platform.registry.versions import Proposal, find_version, propose
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.tuning.record import BestTrial, ScoredStep, all_records

FIRST, SECOND = "trial-00-soflow", "trial-01-flow_matching"


class Registry:
    """Proposes trials of a sweep with a score of one's own."""

    def __init__(self, project: ProjectFolder) -> None:
        (self.record,) = all_records(project)
        self.project = project
        self.tracking = Tracking(TrackingStore(project.tracking_uri), self.record.experiment_id or "")

    def propose(self, trial: str, score: float) -> Proposal:
        found = self.record.checkpoints(self.project, trial).best(self.record.metric, self.record.mode)
        assert found is not None
        checkpoint, evaluation = found
        metrics = {**ScoredStep.of(evaluation).metrics, self.record.metric: score}
        best = BestTrial(trial, checkpoint.state.step, metrics)
        return propose(self.tracking, replace(self.record, best=best).candidate("digits"), checkpoint)

    @property
    def candidate(self) -> str:
        return str(find_version(self.tracking.store, "digits@candidate").version)


@pytest.fixture
def registry(scored: ProjectFolder) -> Registry:
    registry = Registry(scored)
    assert registry.propose(FIRST, 100.0) == Proposal("1", None)
    return registry


def test_the_first_version_and_a_better_one_become_the_candidate(registry: Registry) -> None:
    assert registry.candidate == "1"
    assert registry.propose(SECOND, 99.0) == Proposal("2", None)
    assert registry.candidate == "2"


def test_a_worse_one_is_a_version_and_no_candidate(registry: Registry) -> None:
    made = registry.propose(SECOND, 101.0)
    assert made == Proposal("2", "version 1 has eval/fd_nfe1 100, this 101")
    assert registry.candidate == "1"


def test_one_that_was_scored_otherwise_is_no_candidate(registry: Registry) -> None:
    registry.tracking.client.set_model_version_tag("digits", "1", "eval.samples", "5000")
    made = registry.propose(SECOND, 1.0)
    assert made == Proposal("2", "version 1 was scored otherwise (they differ in eval.samples)")
    assert registry.candidate == "1"


def test_the_same_weights_are_one_version_and_stay_the_candidate(registry: Registry) -> None:
    assert registry.propose(FIRST, 100.0) == Proposal("1", None)
    assert registry.candidate == "1"
