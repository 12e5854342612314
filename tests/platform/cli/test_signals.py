"""SIGTERM, SIGHUP and Ctrl-C to a command that trains: real signals, sent to this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from soflow_platform.cli.display import SweepDisplay
from soflow_platform.cli.shutdown import GracefulShutdown, restart_lost_ray
from soflow_platform.cluster.connection import RayLost
from soflow_platform.config.validation import read_experiment
from soflow_platform.errors import Stopped
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.stop_request import stop_requested

DIGITS = Path(__file__).parents[3] / "sweeps" / "digits.yaml"
NUMBERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@pytest.fixture
def training() -> Iterator[SweepDisplay]:
    """The display of a sweep whose trials are under way; signals mean afterwards what they meant before."""
    before = {number: signal.getsignal(number) for number in (*NUMBERS, signal.SIGALRM)}
    # Under nohup SIGHUP is ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    display = SweepDisplay(Console(), read_experiment(DIGITS)[0], [])
    display.training = True
    yield display
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), list(zip(NUMBERS, (143, 143, 130), strict=True)))
def test_trials_are_asked_to_stop_and_the_exit_code_says_why(
    tmp_path: Path, training: SweepDisplay, number: int, code: int
) -> None:
    storage = ProjectFolder(tmp_path)
    before = {each: signal.getsignal(each) for each in (*NUMBERS, signal.SIGALRM)}

    def stopped() -> None:
        with GracefulShutdown(storage, "sweep", training, grace=60):
            os.kill(os.getpid(), number)
            assert stop_requested(storage, "sweep")
            raise Stopped("it was asked to stop")

    with pytest.raises(SystemExit) as ended:
        stopped()
    assert ended.value.code == code
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    # What the signal means outside the block is as before.
    assert {number: signal.getsignal(number) for number in before} == before


def test_what_takes_longer_than_the_grace_is_ended(tmp_path: Path, training: SweepDisplay) -> None:
    def slow() -> None:
        with GracefulShutdown(ProjectFolder(tmp_path), "sweep", training, grace=0.3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)

    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        slow()
    assert ended.value.code == 143
    assert 0.3 <= time.monotonic() - started < 10


def test_a_hang_up_that_is_ignored_stays_so(tmp_path: Path, training: SweepDisplay) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with GracefulShutdown(ProjectFolder(tmp_path), "sweep", training, grace=60):
        os.kill(os.getpid(), signal.SIGHUP)
    assert not stop_requested(ProjectFolder(tmp_path), "sweep")


@pytest.mark.parametrize(("lost", "allowed", "goes_on"), [(0, 0, True), (2, 2, True), (2, 1, False)])
def test_a_sweep_whose_ray_died_restarts_up_to_max_failures(
    training: SweepDisplay, lost: int, allowed: int, goes_on: bool
) -> None:
    starts = 0

    def sweep() -> str:
        nonlocal starts
        starts += 1
        if starts <= lost:
            raise RayLost("Ray has died.")
        return "finished"

    if goes_on:
        assert restart_lost_ray(sweep, allowed, training.say, lambda: False) == "finished"
    else:
        with pytest.raises(RayLost):
            restart_lost_ray(sweep, allowed, training.say, lambda: False)
    assert starts == 1 + min(lost, allowed)


def test_a_ray_that_dies_while_its_sweep_stops_is_not_started_again(training: SweepDisplay) -> None:
    """SLURM and systemd end every process of a job; a new start would remove the request to stop, and train."""
    starts = 0

    def sweep() -> str:
        nonlocal starts
        starts += 1
        raise RayLost("Ray has died.")

    with pytest.raises(Stopped, match="Ray has died"):
        restart_lost_ray(sweep, 3, training.say, lambda: True)
    assert starts == 1


WAITING = """
import sys, time
from soflow_platform.cli import main

@main.app.command()
def wait() -> None:
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("closed", flush=True)

sys.argv = ["soflowctl", "wait"]
main.main()
"""


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (signal.SIGINT, 130, "interrupted: run the same"),
        (signal.SIGTERM, 143, "terminated: run the same"),
        (signal.SIGHUP, 143, "terminated: run the same"),
    ],
)
def test_a_signal_closes_what_is_open_and_says_how_to_go_on(
    number: signal.Signals, code: int, sentence: str
) -> None:
    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, "closed\n")
    assert errors.count("\n") == 1
    assert sentence in errors
