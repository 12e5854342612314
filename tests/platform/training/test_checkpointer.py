"""AsyncCheckpointer: a checkpoint that cannot be written is reported and retried, never taken for saved; training goes on meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from soflow_core.networks import DiTConfig
from soflow_core.objectives import SoFlow
from soflow_core.weights import save_weights
from soflow_platform.errors import JobError
from soflow_platform.storage import checkpoints
from soflow_platform.storage.checkpoints import CheckpointState, CheckpointStore
from soflow_platform.storage.retry import retry
from soflow_platform.training.checkpointer import AsyncCheckpointer
from soflow_platform.training.trial_status import TrialStatusWriter, read_status
from soflow_platform.training.worker import Trainer
from tests.support.small_disks import mounted

Make = Callable[..., Trainer]
CONFIG = DiTConfig(
    channels=1, height=8, width=8, patch=4, hidden=8, depth=1, heads=2, classes=10, null_label=True
)


def put(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / checkpoints.STATE).write_bytes(content)

    return write


def steps(root: Path | str) -> list[int]:
    return [checkpoint.state.step for checkpoint in CheckpointStore(root).published()]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    messages: list[str] = []
    release = threading.Event()

    def slow(folder: Path) -> None:
        assert release.wait(10)
        put(b"weights")(folder)

    saver = AsyncCheckpointer(CheckpointStore(tmp_path), keep=2, patience=1, log=messages.append)
    saver.submit(CheckpointState(1, 8, "run"), [], slow)
    assert steps(tmp_path) == []
    release.set()
    assert saver.ready(2, needed=False)
    saver.submit(CheckpointState(2, 16, "run"), [], put(b"weights"))
    saver.close()
    assert steps(tmp_path) == [1, 2]
    assert [line.split(" saved")[0] for line in messages] == ["checkpoint of step 1", "checkpoint of step 2"]


@pytest.mark.parametrize(("state", "average"), [(20, 1), (4, 16)], ids=["in the first file", "in the second"])
def test_a_full_disk_is_reported_as_such_for_every_file(tmp_path: Path, state: int, average: int) -> None:
    def write(folder: Path) -> None:
        torch.save({"w": torch.zeros(state << 18)}, folder / checkpoints.STATE)
        save_weights(folder / checkpoints.EMA, {"w": torch.zeros(average << 18)}, CONFIG, SoFlow(), data={})

    messages: list[str] = []
    writer = TrialStatusWriter(tmp_path / "trial", "trial-00", 10, 1)
    with mounted(tmp_path / "disk", mebibytes=16) as disk:
        root = disk / "checkpoints"
        saver = AsyncCheckpointer(
            CheckpointStore(root), 2, 0.1, messages.append, partial(writer.report, "checkpoints")
        )
        saver.submit(CheckpointState(1, 8, "run"), [], put(b"weights"))
        saver.submit(CheckpointState(2, 16, "run"), [1], write)
        with pytest.raises(JobError, match=r"step 2 to .* failed for \d+ s: no space is left on the disk of"):
            saver.close()
        assert steps(root) == [1]
        assert [path.name for path in root.iterdir()] == ["step-00000001"]
    assert "no space is left" in messages[-1]
    status = read_status(tmp_path / "trial")
    assert status is not None
    assert "step 2" in str(status.trouble)
    assert "no space is left on the disk of" in str(status.trouble)


def test_a_trouble_stands_in_the_status_until_it_is_over(tmp_path: Path) -> None:
    writer = TrialStatusWriter(tmp_path, "trial-00", 10, 1)
    seen: list[str | None] = []
    tries = iter([OSError("full"), OSError("full"), None])

    def save() -> None:
        error = next(tries)
        status = read_status(tmp_path)
        seen.append(status.trouble if status else None)
        if error:
            raise error

    writer.report("curves", "the server is away")
    retry(
        save, description="saving", timeout=30, log=writer.log, report=partial(writer.report, "checkpoints")
    )
    both = "the server is away; saving failed (full); trying again for 0.5 min"
    assert seen == ["the server is away", both, both]
    status = read_status(tmp_path)
    assert status is not None
    assert status.trouble == "the server is away"


def test_whatever_a_writer_raises_fails_a_checkpoint_and_is_named(tmp_path: Path) -> None:
    def broken(_: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    messages: list[str] = []
    saver = AsyncCheckpointer(CheckpointStore(tmp_path), keep=2, patience=0.1, log=messages.append)
    saver.submit(CheckpointState(1, 8, "run"), [], broken)
    with pytest.raises(JobError, match="RuntimeError: PytorchStreamWriter failed writing file data/0"):
        saver.close()
    assert "the checkpoints before it are kept" in messages[-1]


class Panic(BaseException):
    """What a library may raise that is no Exception, as those in Rust do."""


def test_not_even_a_panic_of_a_writer_is_lost(tmp_path: Path) -> None:
    def panics(_: Path) -> None:
        raise Panic("index out of bounds")

    messages: list[str] = []
    saver = AsyncCheckpointer(CheckpointStore(tmp_path), keep=2, patience=60, log=messages.append)
    saver.submit(CheckpointState(1, 8, "run"), [], panics)
    with pytest.raises(JobError, match="index out of bounds"):
        saver.close()
    assert "index out of bounds" in messages[-1]


def test_a_trial_without_its_last_checkpoint_is_not_finished(
    worker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = worker("unsaved", "training.patience_minutes=0.001")

    def fails(*_: object) -> None:
        raise RuntimeError("file write failed")

    monkeypatch.setattr("soflow_platform.training.worker.write_state", fails)
    with pytest.raises(JobError, match=r"saving the checkpoint of step 6 .*file write failed"):
        trial.run()
    assert '"state": "finished"' not in (trial.setup.job.folder / "status.json").read_text()


def test_a_lasting_outage_of_the_storage_fails_the_trial_at_its_end(
    tmp_path: Path,
) -> None:
    """Before its end it costs the checkpoint alone."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    messages: list[str] = []
    saver = AsyncCheckpointer(
        CheckpointStore(blocked / "checkpoints"), keep=2, patience=0.2, log=messages.append
    )
    saver.submit(CheckpointState(1, 8, "run"), [], put(b"weights"))
    saver.submit(CheckpointState(2, 16, "run"), [], put(b"weights"))
    with pytest.raises(JobError, match=r"saving the checkpoint of step 2 to .*Not a directory"):
        saver.close()
    assert any(
        "saving the checkpoint of step 1" in line and "before it are kept" in line for line in messages
    )


def test_while_a_checkpoint_is_stuck_only_a_needed_one_waits(tmp_path: Path) -> None:
    """Others are left out."""
    away = tmp_path / "away"
    away.write_text("a file in the place of the folder")
    messages: list[str] = []
    saver = AsyncCheckpointer(CheckpointStore(away), keep=5, patience=60, log=messages.append)
    saver.submit(CheckpointState(1, 8, "run"), [], put(b"weights"))
    started = time.monotonic()
    assert not saver.ready(2, needed=False)
    assert not saver.ready(3, needed=False)
    assert time.monotonic() - started < 30
    assert any("no checkpoint of step 2" in line for line in messages)
    threading.Timer(0.5, away.unlink).start()
    assert saver.ready(4, needed=True)
    saver.submit(CheckpointState(4, 32, "run"), [], put(b"weights"))
    saver.close()
    assert steps(away) == [1, 4]


def test_an_outage_of_the_storage_does_not_change_the_numbers(
    worker: Make,
) -> None:
    """The last step is saved."""
    whole, cut = worker("whole", "evaluation.every=1"), worker("cut", "evaluation.every=1")
    whole.run()
    place = Path(cut.setup.checkpoints.root)
    place.parent.mkdir(parents=True)
    place.write_text("a file in the place of the folder")

    def put_back(*_: object) -> None:
        # A step calls the network more than once, and the checkpointer makes the folder as soon as it can.
        if cut.step == 5 and place.is_file():
            place.unlink()

    cut.train_step.network.register_forward_pre_hook(put_back)
    cut.run()
    assert steps(cut.setup.checkpoints.root) == [1, 6]
    states = []
    for trial in (whole, cut):
        found, _ = trial.setup.checkpoints.newest()
        assert found is not None
        with found.opened(checkpoints.EMA) as path:
            states.append(path.read_bytes())
    assert states[0] == states[1]
    assert "no checkpoint of step 3" in (cut.setup.job.folder / "log.txt").read_text()


def test_old_checkpoints_that_cannot_be_removed_cost_nothing_but_space(tmp_path: Path) -> None:
    messages: list[str] = []
    saver = AsyncCheckpointer(CheckpointStore(tmp_path), keep=1, patience=60, log=messages.append)
    saver.submit(CheckpointState(1, 8, "run"), [], put(b"weights"))
    saver.drain()
    with mounted(tmp_path / "step-00000001" / "in use", mebibytes=1):
        started = time.monotonic()
        saver.submit(CheckpointState(2, 16, "run"), [], put(b"weights"))
        assert saver.ready(3, needed=False)
        saver.close()
        assert time.monotonic() - started < 30
    assert steps(tmp_path) == [2]
    assert messages[1].startswith("checkpoint of step 2 saved")
    assert "cannot be removed and take space" in messages[2]
    saver.submit(CheckpointState(3, 24, "run"), [], put(b"weights"))
    saver.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
