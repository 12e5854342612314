"""A trial's log: whole lines in order from several writers, and a reader that misses none."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soflow_platform.training import trial_log
from soflow_platform.training.trial_log import TrialLog, TrialLogReader, follow, read_tail

MOMENT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


def test_a_line_is_time_step_and_text(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "trial" / "log.txt")
    before = time.time() // 1
    log.write("loss 0.41", step=200)
    log.write("resumed")
    first, second = log.path.read_text().splitlines()
    assert re.fullmatch(MOMENT + r"  step 200  loss 0\.41", first)
    assert re.fullmatch(MOMENT + r"  resumed", second)
    written = time.mktime(time.strptime(first[:20], "%Y-%m-%dT%H:%M:%SZ")) - time.timezone
    assert before <= written <= time.time()


def test_a_text_of_several_lines_is_one_line(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "log.txt")
    log.write("failed:\nno space\r\nleft")
    assert log.path.read_text().count("\n") == 1
    assert log.path.read_text().endswith("  failed: / no space / left\n")


def test_lines_of_several_processes_are_whole_and_in_the_order_of_each(tmp_path: Path) -> None:
    path, lines = tmp_path / "log.txt", 150
    program = (
        "import sys; from pathlib import Path; from soflow_platform.training.trial_log import TrialLog\n"
        "log = TrialLog(Path(sys.argv[1]))\n"
        f"for n in range({lines}): log.write(f'{{sys.argv[2]}} {{n}} ' + sys.argv[2] * 5000)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    found = [line.split("  ", 1)[1].split(" ") for line in path.read_text().splitlines()]
    for name in "abc":
        own = [(int(n), text) for who, n, text in found if who == name]
        assert own == [(n, name * 5000) for n in range(lines)]


def test_a_line_whose_writer_was_killed_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("2026-11-23T22:59:01Z  step 2  half a li")
    TrialLog(path).write("going on")
    cut, whole = path.read_text().splitlines()
    assert cut == "2026-11-23T22:59:01Z  step 2  half a li"
    assert whole.endswith("Z  going on")


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.text("abé ", max_size=12), max_size=12),
    wanted=st.integers(0, 14),
    block=st.integers(1, 40),
    cut=st.booleans(),
)
def test_the_tail_is_the_last_lines_whatever_the_block(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], wanted: int, block: int, cut: bool
) -> None:
    path = tmp_path_factory.mktemp("tail") / "log.txt"
    text = "".join(f"{line}\n" for line in lines) + ("half" if cut else "")
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial_log, "BLOCK", block)
        assert read_tail(path, wanted) == text.splitlines()[max(0, len(text.splitlines()) - wanted) :]


def test_a_log_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "log.txt", 5) == []
    assert list(follow(tmp_path / "log.txt", stop=lambda: True)) == []


def test_follow_yields_the_last_lines_then_each_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends when `stop` returns True."""
    monkeypatch.setattr(trial_log, "POLL_SECONDS", 0.01)
    log, ended = TrialLog(tmp_path / "log.txt"), threading.Event()
    for n in range(3):
        log.write(f"old {n}")

    def write() -> None:
        for n in range(20):
            log.write(f"new {n}")
            time.sleep(0.005)
        ended.set()

    followed = follow(log.path, ended.is_set, lines=1)
    assert next(followed).endswith("  old 2")
    writer = threading.Thread(target=write)
    writer.start()
    assert [line.split("  ")[1] for line in followed] == [f"new {n}" for n in range(20)]
    writer.join()


def test_a_line_is_read_once_it_is_complete(
    tmp_path: Path,
) -> None:
    """A log that was replaced is read from its start."""
    path = tmp_path / "log.txt"
    reader = TrialLogReader(path)
    assert reader.new_lines() == []
    path.write_text("first\nsec")
    assert reader.new_lines() == ["first"]
    path.write_text("first\nsecond\n")
    assert reader.new_lines() == ["second"]
    path.write_text("new\n")
    assert reader.new_lines() == ["new"]


def test_a_tail_that_begins_within_a_traceback_has_all_of_it(tmp_path: Path) -> None:
    log = TrialLog(tmp_path / "log.txt")
    log.write("starting")
    log.write_block("\n".join(f"frame {number}" for number in range(50)))
    log.write("failed")
    texts = [line[len("2026-11-23T22:59:01Z") :] for line in read_tail(log.path, 3)]
    # The line before a text of several lines says what it belongs to.
    assert texts == ["  starting", *(f"  | frame {number}" for number in range(50)), "  failed"]
    assert read_tail(log.path, 1) == read_tail(log.path, 60)[-1:]
