"""Processes of Ray's that die beside those that train: the trial goes on, and where it cannot, the command says so and ends."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from soflow_platform.storage.project import ProjectFolder
from tests.support.watched import LOG_EVERY, Outcome, Watched

pytestmark = pytest.mark.faults
Note = Callable[[Outcome], None]
STEPS = 1500

PROGRESS_ACTOR, DRIVER, CONTROLLER, CLEANER, WORKER = (
    "ray::ProgressActor",
    "ray::TrialActor",
    "ray::TrainController",
    "ray::PlacementGroupCleaner",
    "ray::RayTrainWorker",
)


@pytest.mark.parametrize(
    ("names", "workers", "what"),
    [
        ([DRIVER, PROGRESS_ACTOR], 1, "the process of a trial, and the sweep's progress actor"),
        ([DRIVER], 2, "the process that watches a trial of two workers"),
        ([CONTROLLER], 2, "Ray Train's controller of a trial"),
        (
            [DRIVER, CONTROLLER, CLEANER, WORKER, WORKER, PROGRESS_ACTOR],
            2,
            "every process of a trial of two workers, and the sweep's progress actor",
        ),
        (["raylet/raylet"], 1, "the local Ray's raylet, and all workers with it"),
    ],
)
def test_a_trial_goes_on_where_part_of_ray_is_killed(
    tmp_path: Path, outcome: Note, names: list[str], workers: int, what: str
) -> None:
    settings = f"resources.workers={workers}"
    # A trial may train on for a while without its raylet.
    steps = 5 * STEPS if "raylet/raylet" in names else STEPS
    # Seconds between two saves also on a fast machine, for the fault to come between them.
    sweep = Watched(ProjectFolder(tmp_path / "runs"), settings, steps=steps, every=500, save_every=250)
    sweep.trains()
    sweep.wait_for(lambda: len(sweep.processes(*names)) == len(names))
    victims = sweep.processes(*names)
    since = time.monotonic()
    for victim in victims:
        # One that dies takes along what it owns.
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    seconds, lost = sweep.recovery(since)
    sweep.succeeds()
    sweep.expect_whole_curves()
    assert lost <= sweep.save_every + LOG_EVERY
    outcome(Outcome(f"kill -9 of {what}", "state `restarting`, then `running`; exit 0", seconds, lost))


def test_a_progress_actor_that_is_killed_costs_nothing(tmp_path: Path, outcome: Note) -> None:
    sweep = Watched(ProjectFolder(tmp_path / "runs"), steps=STEPS, every=500, save_every=100)
    step = sweep.trains()
    (actor,) = sweep.processes(PROGRESS_ACTOR)
    since = time.monotonic()
    actor.kill()
    sweep.wait_for(lambda: sweep.status["step"] > step + 2 * LOG_EVERY)
    seconds = time.monotonic() - since
    printed = sweep.succeeds()
    sweep.expect_whole_curves()
    assert f"step {STEPS:,}: eval/fd_nfe1" in printed
    assert "going on with 1 worker" not in sweep.log
    outcome(Outcome("kill -9 of the sweep's progress actor", "training goes on; exit 0", seconds, 0))


def test_a_ray_that_dies_again_and_again_ends_the_command_with_a_sentence(
    tmp_path: Path, outcome: Note
) -> None:
    # Long enough for the trial not to end before its process knows that the raylet is dead.
    sweep = Watched(
        ProjectFolder(tmp_path / "runs"),
        "resources.max_failures=0",
        steps=5 * STEPS,
        every=500,
        save_every=100,
    )
    sweep.trains()
    (raylet,) = sweep.processes("raylet/raylet")
    since = time.monotonic()
    raylet.kill()
    message = sweep.fails(60)
    seconds = time.monotonic() - since
    *logged, sentence = message.splitlines()
    assert sentence.startswith("soflowctl: failed: the Ray node that this command is connected to has died.")
    assert all(re.match(r"\[.+ E \d+ \d+\] \w+\.cc:\d+: ", line) for line in logged), "of Ray's own"
    again = Watched(sweep.storage, "resources.max_failures=0", steps=5 * STEPS, every=500, save_every=100)
    _, lost = again.recovery(time.monotonic())
    again.succeeds(600)
    again.expect_whole_curves()
    outcome(
        Outcome(
            "the local Ray's raylet killed, max_failures: 0",
            f"exit 1 and one sentence after {seconds:.0f} s; the same command goes on",
            None,
            lost,
        )
    )
