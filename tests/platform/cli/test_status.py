"""soflowctl status, logs and stop, which read and write files of the project folder."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from soflow_pipelines.storage.files import write_json
from soflow_platform.cli.main import main
from soflow_platform.storage.locks import RETRY_SECONDS
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.stop_request import clear_stops, request_stop, stop_requested
from soflow_platform.training.trial_log import LOG, TrialLog
from soflow_platform.training.trial_status import STATUS, TrialState, TrialStatusWriter
from soflow_platform.tuning.record import SweepRecord, TrialEntry, is_running, lock_sweep

TRIALS = ("trial-00-lr=0.1", "trial-01-lr=0.2")
HERE = socket.gethostname()
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def soflowctl(
    storage: ProjectFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """The console entry point in this process -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("SOFLOW_STORAGE", str(storage.root))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["soflowctl", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capfd.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def sweep(storage: ProjectFolder, name: str, digest: str, age: float = 0.0, **fields: Any) -> SweepRecord:
    """A sweep of two trials that was started `age` seconds ago."""
    values: dict[str, Any] = {
        "id": f"{name}-{digest}",
        "name": name,
        "file": f"{name}.yaml",
        "experiment": {"training": {"steps": 400, "checkpoints": None}},
        "trials": [TrialEntry(trial, {}) for trial in TRIALS],
        "metric": "eval/fd_nfe1",
        "mode": "min",
        "created": time.time() - age,
        "attempts": 1,
    }
    record = SweepRecord(**{**values, **fields})
    record.save(storage)
    return record


def write_status(
    storage: ProjectFolder, record: SweepRecord, trial: str, age: float = 1.0, **fields: Any
) -> None:
    """A status file as the first worker of a trial writes it."""
    status = {"state": "running", "step": 200, "steps": 400, "images": 25600, "images_per_second": 310.0}
    status |= {"eta_seconds": 75.0, "loss": 0.4123, "host": HERE, "pid": os.getpid(), "attempt": 1}
    path = storage.trial(record.id, trial) / STATUS
    write_json(path, {**status, "updated": time.time() - age, **fields})


def states(printed: str) -> dict[str, str]:
    return {status["trial"]: status["state"] for status in json.loads(printed)}


NAMES = {
    "an id": ("digits-aa11", [("digits-aa11", TRIALS[0]), ("digits-aa11", TRIALS[1])]),
    "the beginning of an id": ("digits-a", [("digits-aa11", TRIALS[0]), ("digits-aa11", TRIALS[1])]),
    "the name of the only sweep of a file": (
        "xl2",
        [("xl2-cc33", TRIALS[0]), ("xl2-cc33", TRIALS[1])],
    ),
    "a trial of the newest sweep": (TRIALS[1], [("xl2-cc33", TRIALS[1])]),
    "the beginning of such a trial": ("trial-01", [("xl2-cc33", TRIALS[1])]),
    "a trial of a sweep": (f"digits-bb22/{TRIALS[0]}", [("digits-bb22", TRIALS[0])]),
    "the beginnings of both": ("digits-b/trial-00", [("digits-bb22", TRIALS[0])]),
}
NO_NAMES = {
    "the name of two sweeps": (
        "digits",
        "'digits' is the name of 2: digits-bb22, digits-aa11.",
    ),
    "the beginning of two trials": (
        "trial-0",
        f"'trial-0' is the name of 2: xl2-cc33/{TRIALS[0]}, xl2-cc33/{TRIALS[1]}.",
    ),
    "the name of two sweeps before a trial": (
        "digits/trial-00",
        "'digits' is the name of 2 sweeps: digits-bb22, digits-aa11.",
    ),
    "the beginning of two trials of a sweep": (
        "xl2/trial-0",
        f"'trial-0' is the name of 2 trials of xl2-cc33: {TRIALS[0]}, {TRIALS[1]}.",
    ),
    "no sweep before a trial": (
        "faces/trial-00",
        "there is no sweep 'faces' under",
    ),
    "no trial of a sweep": (
        "xl2/trial-07",
        f"sweep xl2-cc33 has no trial 'trial-07'; it has {TRIALS[0]}, {TRIALS[1]}.",
    ),
    "nothing": (
        "faces",
        f"sweeps are xl2-cc33, digits-bb22, digits-aa11; trials of xl2-cc33 are {TRIALS[0]}, {TRIALS[1]}.",
    ),
}


@pytest.fixture
def three_sweeps(storage: ProjectFolder) -> None:
    for age, (name, digest) in enumerate([("xl2", "cc33"), ("digits", "bb22"), ("digits", "aa11")]):
        sweep(storage, name, digest, age=60.0 * age)


@pytest.mark.usefixtures("three_sweeps")
@pytest.mark.parametrize("kind", NAMES)
def test_a_sweep_or_trial_is_found_by(kind: str, soflowctl: Command) -> None:
    name, expected = NAMES[kind]
    code, printed, _ = soflowctl("status", name, "--json")
    assert code == 0
    assert [(status["sweep"], status["trial"]) for status in json.loads(printed)] == expected


@pytest.mark.usefixtures("three_sweeps")
@pytest.mark.parametrize("kind", NO_NAMES)
@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_a_name_that_is_none_or_several_is_refused_with_the_candidates(
    kind: str, command: str, soflowctl: Command
) -> None:
    name, message = NO_NAMES[kind]
    code, printed, error = soflowctl(command, name)
    assert (code, printed) == (2, "")
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_the_name_of_one_sweep_is_not_taken_for_the_beginning_of_another(
    storage: ProjectFolder, soflowctl: Command
) -> None:
    sweep(storage, "digits", "aa11")
    sweep(storage, "digits-wide", "bb22")
    assert "digits-aa11: cut" in soflowctl("status", "digits")[1]


def test_a_storage_that_is_away_fails_a_command_with_one_sentence(
    storage: ProjectFolder, soflowctl: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    place = "s3://bucket/prefix?endpoint_override=127.0.0.1:9&scheme=http"
    sweep(storage, "digits", "aa11", experiment={"training": {"steps": 400, "checkpoints": place}})
    code, _, message = soflowctl("runs", "digits")
    assert code == 1
    assert (
        "failed: s3://bucket/prefix/digits-aa11/trial-00-lr=0.1 cannot be listed: the connection failed"
        in message
    )
    assert len(message.splitlines()) == 1


def test_status_without_a_name_shows_what_runs_and_else_the_newest_sweep(
    storage: ProjectFolder, soflowctl: Command
) -> None:
    assert soflowctl("status") == (
        0,
        f"no sweeps under {storage.root}; start one with: soflowctl run digits\n",
        "",
    )
    assert soflowctl("status", "--json")[1] == "[]\n"
    old, new = sweep(storage, "digits", "aa11", age=60), sweep(storage, "digits", "bb22")
    assert soflowctl("status")[1].startswith(f"sweep {new.id}: cut")
    with lock_sweep(storage, old.id):
        assert soflowctl("status")[1].startswith(f"sweep {old.id}: running")


def test_status_shows_the_status_file_of_a_running_trial(storage: ProjectFolder, soflowctl: Command) -> None:
    record = sweep(storage, "digits", "aa11", attempts=3)
    write_status(storage, record, TRIALS[0], age=2.0, attempt=3)
    checkpoint = storage.trial(record.id, TRIALS[0]) / "checkpoints" / "step-00000150"
    write_json(checkpoint / "checkpoint.json", {})
    # Still being written: it has no record yet.
    (checkpoint.parent / "step-00000200").mkdir()
    with lock_sweep(storage, record.id):
        code, printed, _ = soflowctl("status", record.id)
        trial, waiting = json.loads(soflowctl("status", record.id, "--json")[1])
    assert code == 0
    head, _, first, second = printed.splitlines()
    assert head == f"sweep {record.id}: running, started 3 times"
    cells = re.split(r"\s{2,}", first.strip())
    assert cells == [
        *(TRIALS[0], "running", "200/400", "310", "75 s", "0.4123", "step 150", "2 s ago", "2"),
    ]
    assert re.split(r"\s{2,}", second.strip()) == [TRIALS[1], "waiting", "0/400", *["-"] * 5, "0"]
    assert 2.0 <= trial.pop("heartbeat_seconds") < 10.0
    assert trial == {
        "sweep": record.id,
        "trial": TRIALS[0],
        "state": "running",
        "step": 200,
        "steps": 400,
        "images": 25600,
        "images_per_second": 310.0,
        "eta_seconds": 75.0,
        "loss": 0.4123,
        "checkpoint_step": 150,
        "silent": False,
        "restarts": 2,
        "host": HERE,
        "pid": os.getpid(),
    }
    assert (waiting["state"], waiting["step"], waiting["heartbeat_seconds"]) == ("waiting", 0, None)


def test_a_status_older_than_a_minute_is_stale_while_its_sweep_runs(
    storage: ProjectFolder, soflowctl: Command
) -> None:
    record = sweep(storage, "digits", "aa11")
    write_status(storage, record, TRIALS[0], age=30.0)
    write_status(storage, record, TRIALS[1], age=125.0, state="evaluating")
    with lock_sweep(storage, record.id):
        printed = soflowctl("status")[1]
        silent = [status["silent"] for status in json.loads(soflowctl("status", "--json")[1])]
    assert silent == [False, True]
    silent = re.search(r"evaluating, silent for (\d+) s", printed)
    assert silent is not None
    assert 125 <= int(silent[1]) < 185
    assert printed.count("silent") == 1
    assert "silent" not in soflowctl("status")[1]


def test_the_state_in_a_status_file_holds_only_while_its_sweep_runs(
    storage: ProjectFolder, soflowctl: Command
) -> None:
    record = sweep(storage, "digits", "aa11")
    write_status(storage, record, TRIALS[0])
    assert states(soflowctl("status", "--json")[1]) == {TRIALS[0]: "cut", TRIALS[1]: "not started"}
    write_status(storage, record, TRIALS[1], state="failed")
    assert states(soflowctl("status", "--json")[1]) == {TRIALS[0]: "cut", TRIALS[1]: "failed"}
    write_status(storage, record, TRIALS[0], step=400)
    write_json(storage.trial(record.id, TRIALS[0]) / "checkpoints" / "step-00000400" / "checkpoint.json", {})
    assert states(soflowctl("status", "--json")[1])[TRIALS[0]] == "finished"
    record.attempts = 2
    record.save(storage)
    with lock_sweep(storage, record.id):
        # Started again: the status of the start before does not hold any more.
        assert states(soflowctl("status", "--json")[1])[TRIALS[1]] == "waiting"
        request_stop(storage, record.id, TRIALS[1])
        assert states(soflowctl("status", "--json")[1])[TRIALS[1]] == "stopping"


def test_a_fresh_status_of_another_machine_counts_as_running(
    storage: ProjectFolder, soflowctl: Command
) -> None:
    record = sweep(storage, "digits", "aa11")
    write_status(storage, record, TRIALS[0], host="another")
    assert "running" in soflowctl("status")[1].splitlines()[0]
    write_status(storage, record, TRIALS[0], host="another", age=61)
    assert "cut" in soflowctl("status")[1].splitlines()[0]
    write_status(storage, record, TRIALS[0], host="another", state="finished")
    assert "cut" in soflowctl("status")[1].splitlines()[0]


def test_a_trials_own_number_of_steps_and_checkpoint_folder_are_used(
    storage: ProjectFolder, soflowctl: Command, tmp_path: Path
) -> None:
    varied = [TrialEntry(trial, {}, steps=10) for trial in TRIALS]
    training = {"steps": 400, "checkpoints": str(tmp_path / "elsewhere")}
    record = sweep(storage, "digits", "aa11", trials=varied, experiment={"training": training})
    write_json(tmp_path / "elsewhere" / record.id / TRIALS[0] / "step-00000010" / "checkpoint.json", {})
    first, second = json.loads(soflowctl("status", "--json")[1])
    assert (first["steps"], first["checkpoint_step"], first["state"]) == (10, 10, "finished")
    assert (second["steps"], second["checkpoint_step"], second["state"]) == (10, None, "not started")


def test_a_stop_request_holds_for_a_trial_or_its_sweep_until_cleared(
    storage: ProjectFolder,
) -> None:
    record = sweep(storage, "digits", "aa11")
    other = sweep(storage, "digits", "bb22")

    def asked() -> list[bool]:
        return [stop_requested(storage, record.id, trial) for trial in (*TRIALS, None)]

    assert asked() == [False, False, False]
    request_stop(storage, record.id, TRIALS[0])
    assert asked() == [True, False, False]
    request_stop(storage, record.id)
    request_stop(storage, record.id)
    assert asked() == [True, True, True]
    assert not stop_requested(storage, other.id, TRIALS[0])
    clear_stops(storage, record.id)
    assert asked() == [False, False, False]
    clear_stops(storage, record.id)


def test_what_does_not_run_cannot_be_stopped(storage: ProjectFolder, soflowctl: Command) -> None:
    record = sweep(storage, "digits", "aa11")
    assert soflowctl("stop", record.id) == (
        2,
        "",
        f"soflowctl: error: sweep {record.id} is not running (cut): there is nothing to stop.\n",
    )
    with lock_sweep(storage, record.id):
        write_status(storage, record, TRIALS[0], state="finished")
        code, _, error = soflowctl("stop", TRIALS[0])
    assert code == 2
    assert f"trial {TRIALS[0]} of sweep {record.id} is finished: there is nothing to stop." in error
    assert not list(storage.root.rglob("stop.json"))


def test_a_trial_that_has_not_begun_is_passed_over_and_not_waited_for(
    storage: ProjectFolder, soflowctl: Command
) -> None:
    record = sweep(storage, "digits", "aa11")
    write_status(storage, record, TRIALS[0])
    with lock_sweep(storage, record.id):
        code, printed, _ = soflowctl("stop", TRIALS[1])
        assert (code, len(printed.splitlines())) == (0, 1)
        assert f"trial {TRIALS[1]} of sweep {record.id} has not begun: it is passed over" in printed
        assert stop_requested(storage, record.id, TRIALS[1])
        assert not stop_requested(storage, record.id, TRIALS[0])


@pytest.mark.parametrize(("attempts", "restarts"), [([1], 0), ([3], 0), ([1, 2, 4], 3), ([2, 3], 1)])
def test_restarts_count_from_the_trials_own_first_start(
    storage: ProjectFolder, soflowctl: Command, attempts: list[int], restarts: int
) -> None:
    record = sweep(storage, "digits", "aa11", attempts=attempts[-1])
    for attempt in attempts:
        TrialStatusWriter(storage.trial(record.id, TRIALS[0]), TRIALS[0], 400, attempt).set_state(
            TrialState.RUNNING, step=7
        )
    shown, _ = json.loads(soflowctl("status", record.id, "--json")[1])
    assert (shown["restarts"], shown["step"]) == (restarts, 7)


def test_stop_that_runs_out_of_time_leaves_its_request(storage: ProjectFolder, soflowctl: Command) -> None:
    """Meanwhile it prints what it waits for."""
    record = sweep(storage, "digits", "aa11")
    write_status(storage, record, TRIALS[0])
    with lock_sweep(storage, record.id):
        code, printed, error = soflowctl("stop", record.id, "--wait", "0.1")
        assert code == 1
        assert f"waiting for {TRIALS[0]} (step 200)\n" in printed
        assert (
            f"has not stopped within 0.1 s, waiting for {TRIALS[0]} (step 200); the request stands" in error
        )
        assert stop_requested(storage, record.id)
        code, printed, _ = soflowctl("stop", record.id, "--wait", "0")
        assert (code, printed.splitlines()[1]) == (0, f"watch it with: soflowctl status {record.id}")


def test_logs_of_a_sweep_are_its_trials_lines_in_the_order_of_time(
    storage: ProjectFolder, soflowctl: Command
) -> None:
    record = sweep(storage, "digits", "aa11")
    assert soflowctl("logs", record.id) == (0, "", f"sweep {record.id} has logged nothing yet.\n")
    moments = [f"2026-11-23T22:59:0{second}Z" for second in range(6)]
    for trial, own in zip(TRIALS, (moments[::2], moments[1::2]), strict=True):
        path = storage.trial(record.id, trial) / LOG
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"{moment}  one\n{moment}  two\n" for moment in own))
    _, printed, _ = soflowctl("logs", record.id, "--lines", "5")
    assert printed.splitlines() == [
        f"{TRIALS[1]}  {moments[3]}  two",
        f"{TRIALS[0]}  {moments[4]}  one",
        f"{TRIALS[0]}  {moments[4]}  two",
        f"{TRIALS[1]}  {moments[5]}  one",
        f"{TRIALS[1]}  {moments[5]}  two",
    ]
    assert soflowctl("logs", "trial-00", "-n", "1")[1] == f"{moments[4]}  two\n"
    assert soflowctl("logs", "trial-00", "-n", "0")[1] == ""


def test_following_a_log_ends_with_its_sweep_and_misses_nothing(
    storage: ProjectFolder, soflowctl: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soflow_platform.cli.status.POLL_SECONDS", 0.01)
    record = sweep(storage, "digits", "aa11")
    log = TrialLog(storage.trial(record.id, TRIALS[0]) / LOG)
    log.write("starting")
    held = threading.Event()

    def train() -> None:
        with lock_sweep(storage, record.id):
            held.set()
            for step in range(30):
                time.sleep(0.005)
                log.write("trained", step)

    trainer = threading.Thread(target=train)
    trainer.start()
    assert held.wait(10)
    code, printed, _ = soflowctl("logs", TRIALS[0], "--follow", "--lines", "100")
    trainer.join()
    assert code == 0
    texts = [line.split("  ", 1)[1] for line in printed.splitlines()]
    assert texts == ["starting", *(f"step {step}  trained" for step in range(30))]


def test_a_reader_that_has_enough_of_a_log_is_no_failure(storage: ProjectFolder) -> None:
    record = sweep(storage, "digits", "aa11")
    path = storage.trial(record.id, TRIALS[0]) / LOG
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"2026-11-23T22:59:01Z  {'x' * 100}\n" for _ in range(5000)))
    command = [sys.executable, "-m", "soflow_platform.cli.main", "logs", TRIALS[0], "-n", "5000"]
    with subprocess.Popen(
        [*command, "--storage", str(storage.root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as logs:
        assert logs.stdout is not None
        assert logs.stdout.readline().startswith("2026")
        logs.stdout.close()
        assert logs.stderr is not None
        assert logs.stderr.read() == ""
    assert logs.returncode == 0


def test_reading_a_lock_neither_holds_it_nor_keeps_it_from_being_taken(
    storage: ProjectFolder,
) -> None:
    record = sweep(storage, "digits", "aa11")
    assert not is_running(storage, record.id)
    with lock_sweep(storage, record.id):
        assert is_running(storage, record.id)
    seen: list[bool] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            seen.append(is_running(storage, record.id))
            time.sleep(0.001)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    time.sleep(0.2)
    assert seen
    assert not any(seen)
    started = time.monotonic()
    with lock_sweep(storage, record.id):
        assert time.monotonic() - started < RETRY_SECONDS
        ended.set()
        for looker in lookers:
            looker.join()


def test_a_sweep_with_a_failed_trial_is_failed_in_runs_and_status(
    storage: ProjectFolder, soflowctl: Command
) -> None:
    record = sweep(storage, "digits", "aa11")
    write_status(storage, record, TRIALS[0], state="finished", step=400)
    write_status(storage, record, TRIALS[1], state="failed", failure="the loss is not finite.")
    assert "sweep digits-aa11: failed" in soflowctl("status")[1]
    (row,) = (line for line in soflowctl("runs")[1].splitlines() if line.startswith("digits-aa11"))
    assert "  failed  " in row
    with lock_sweep(storage, record.id):
        assert "sweep digits-aa11: running" in soflowctl("status")[1]
