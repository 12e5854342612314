"""A trial of several workers that waits for machines: how long is told by one clock, whatever the progress actor knows."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.job import TrialJob
from soflow_platform.training.trial_status import TrialState
from soflow_platform.tuning import trial
from soflow_platform.tuning.progress import ProgressActor
from soflow_platform.tuning.trial import EndKind, TrialDriver, TrialEnd, TrialTask
from tests.platform.conftest import small_experiment


class Called:
    """The progress actor in this process: what is called is done at once."""

    def __init__(self) -> None:
        self.actor = ProgressActor()

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self.actor, name))


class Training:
    """A Ray Train run whose workers never come, and that ends after some looks at it."""

    lost = failure = None

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def start(self) -> None:
        pass

    def is_alive(self) -> bool:
        self.looks -= 1
        return self.looks >= 0


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Called:
    called = Called()
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr(trial, "progress_actor", lambda _: called)
    monkeypatch.setattr(trial, "POLL_SECONDS", 0.01)
    return called


def waits(storage: ProjectFolder, wait_minutes: float, train: Any) -> TrialEnd:
    """How the trial ends whose workers have not come yet."""
    experiment = small_experiment("resources.workers=2", f"resources.wait_minutes={wait_minutes}")
    job = TrialJob(
        "sweep", "trial", experiment.resolved(), "data", str(storage.root), "sqlite:///x.db", "run"
    )
    driver = TrialDriver(TrialTask(job, "0", "parent", {}, "trial"))
    driver.status.set_state(TrialState.STARTING)
    supervised = driver.supervise(train)
    with pytest.raises(StopIteration) as ended:
        next(supervised)
    end = ended.value.value
    assert isinstance(end, TrialEnd)
    return end


def test_a_clock_that_is_set_ends_no_wait(storage: ProjectFolder, actor: Called) -> None:
    class Set(Training):
        def start(self) -> None:
            before = actor.actor.progress("trial")
            actor.actor._statuses["trial"] = replace(before, since=time.time() - 3600)

    assert waits(storage, 30, Set(3)).kind is EndKind.COMPLETED


def test_a_wait_ends_where_the_progress_actor_has_forgotten_it(
    storage: ProjectFolder, actor: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It restarts empty where its process dies, and workers that are waited for send it nothing."""

    class Forgotten(Training):
        def is_alive(self) -> bool:
            if self.looks == 5_000 - 2:
                actor.actor = ProgressActor()
            return super().is_alive()

    monkeypatch.setattr(trial, "WAITING_SECONDS", 0.05)
    end = waits(storage, 0.005, Forgotten(5_000))
    assert (end.kind, end.status.state) == (EndKind.NO_MACHINES, TrialState.STARTING)
    log = (storage.trial("sweep", "trial") / "log.txt").read_text()
    assert log.count("waits for machines") == 1
