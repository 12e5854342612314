"""A checkpoint is complete or absent, in a folder and in S3, and is verified when it is read."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from soflow_pipelines.storage.object_store import StorageError
from soflow_pipelines.storage.opening import open_storage
from soflow_platform.storage import checkpoints
from soflow_platform.storage.checkpoints import CheckpointState, CheckpointStore
from soflow_platform.training import state_files
from soflow_platform.training.checkpointer import AsyncCheckpointer
from soflow_platform.training.state_files import TensorFile, opened_state, write_state
from soflow_platform.training.worker import Trainer
from tests.support.object_store import S3Server, Wire, serving, set_credentials, uri
from tests.support.trained_state import differing_tensors, final_state

Make = Callable[..., Trainer]


class Killed(BaseException):
    """Stands for the end of a process: nothing after it runs, and nothing may catch it."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serving(tmp_path_factory.mktemp("s3") / "data", "runs") as running:
        yield running


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    set_credentials(monkeypatch)
    return uri(server.port, f"runs/{request.node.name}")


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "checkpoints") if request.param == "folder" else str(request.getfixturevalue("bucket"))
    )


def put(content: bytes, name: str = checkpoints.STATE) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return write


def steps(root: str) -> list[int]:
    return [checkpoint.state.step for checkpoint in CheckpointStore(root).published()]


def test_what_is_published_is_read_back(root: str) -> None:
    position = CheckpointState(5, 40, "run", [{"step": 5, "fd": 1.5}])
    CheckpointStore(root).publish(position, put(b"weights"))
    found, damaged = CheckpointStore(root).newest()
    assert found is not None
    assert (found.state, damaged) == (position, [])
    with found.opened(checkpoints.STATE) as path:
        assert path.read_bytes() == b"weights"


def test_a_checkpoint_being_written_when_the_process_dies_does_not_exist(root: str) -> None:
    def dies(folder: Path) -> None:
        (folder / checkpoints.STATE).write_bytes(b"half")
        raise Killed

    with pytest.raises(Killed):
        CheckpointStore(root).publish(CheckpointState(5, 40, "run"), dies)
    # Killed later, between two of its files: the record comes last.
    open_storage(root).write(f"step-00000006/{checkpoints.STATE}", b"whole")
    assert CheckpointStore(root).newest() == (None, [])
    CheckpointStore(root).publish(CheckpointState(7, 56, "run"), put(b"weights"))
    CheckpointStore(root).prune(keep=1)
    assert {name.partition("/")[0] for name in open_storage(root).names()} == {"step-00000007"}


@pytest.mark.parametrize("damage", [b"weightz", b"weight", None], ids=["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(root: str, damage: bytes | None) -> None:
    for step in (4, 6):
        CheckpointStore(root).publish(CheckpointState(step, 8 * step, "run"), put(b"weights"))
    name, storage = f"step-00000006/{checkpoints.STATE}", open_storage(root)
    if damage is None:
        storage.remove(name)
    else:
        storage.write(name, damage)
    found, damaged = CheckpointStore(root).newest()
    assert found is not None
    assert found.state.step == 4
    assert damaged == ["step-00000006 is damaged (state.pt): going back to the one before it."]


@pytest.mark.parametrize(
    "record", [b"", b'{"step": 6, "im', b"[]", b"{}"], ids=["empty", "torn", "list", "hollow"]
)
def test_a_record_that_cannot_be_read_is_damage_like_any_other(root: str, record: bytes) -> None:
    for step in (4, 6):
        CheckpointStore(root).publish(
            CheckpointState(step, 8 * step, "run", [{"step": step, "fd": 1.0}]), put(b"weights")
        )
    open_storage(root).write(f"step-00000006/{checkpoints.RECORD}", record)
    found, damaged = CheckpointStore(root).newest()
    assert found is not None
    assert found.state.step == 4
    assert damaged == ["step-00000006 is damaged (checkpoint.json): going back to the one before it."]
    assert steps(root) == [4]
    CheckpointStore(root).prune(keep=2)
    assert {name.partition("/")[0] for name in open_storage(root).names()} == {"step-00000004"}


def test_a_record_of_a_later_version_is_read(root: str) -> None:
    CheckpointStore(root).publish(CheckpointState(4, 32, "run"), put(b"weights"))
    name, storage = f"step-00000004/{checkpoints.RECORD}", open_storage(root)
    storage.write(name, json.dumps({**json.loads(storage.read(name)), "mood": "good"}).encode())
    found, damaged = CheckpointStore(root).newest()
    assert (found is not None, damaged) == (True, [])


def test_damaged_checkpoints_are_removed_before_sound_ones(root: str) -> None:
    """Those that training went back from do not count among the newest that are kept."""
    for step in (300, 500, 537):
        CheckpointStore(root).publish(CheckpointState(step, 8 * step, "run"), put(b"weights"))
    open_storage(root).write(f"step-00000500/{checkpoints.STATE}", b"weightz")
    open_storage(root).write(f"step-00000537/{checkpoints.RECORD}", b"")
    found, damaged = CheckpointStore(root).newest()
    assert found is not None
    assert (found.state.step, len(damaged)) == (300, 2)
    CheckpointStore(root).discard_after(found.state.step)
    CheckpointStore(root).publish(CheckpointState(310, 2480, "run"), put(b"weights"))
    CheckpointStore(root).prune(keep=2)
    assert steps(root) == [300, 310]
    assert {name.partition("/")[0] for name in open_storage(root).names()} == {
        "step-00000300",
        "step-00000310",
    }


def test_the_best_checkpoint_is_the_best_whose_weights_are_sound(root: str) -> None:
    evaluations: list[dict[str, float]] = []
    for step, distance in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 0.5)):
        evaluations.append({"step": step, "fd": distance})
        if step < 4:
            position = CheckpointState(step, 8 * step, "run", list(evaluations))
            CheckpointStore(root).publish(position, put(b"weights", checkpoints.EMA))
    found = CheckpointStore(root).best("fd", "min")
    assert found is not None
    assert (found[0].state.step, found[1]) == (2, {"step": 2, "fd": 1.0})
    open_storage(root).write(f"step-00000002/{checkpoints.EMA}", b"weightz")
    found = CheckpointStore(root).best("fd", "min")
    assert found is not None
    assert found[0].state.step == 1
    assert CheckpointStore(root).best("label_agreement", "max") is None


def test_what_a_killed_writer_left_is_removed_at_the_next_start(root: str, tmp_path: Path) -> None:
    half = tmp_path / "half"

    def dies(folder: Path) -> None:
        put(b"half")(folder)
        half.write_text(str(folder))
        os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(
        target=CheckpointStore(root).publish, args=(CheckpointState(5, 40, "run"), dies)
    )
    child.start()
    child.join(20)
    left = Path(half.read_text())
    assert (left / checkpoints.STATE).read_bytes() == b"half"
    CheckpointStore(root).discard_after(0)
    assert not left.exists()


def test_a_damaged_file_is_not_opened(root: str) -> None:
    published = CheckpointStore(root).publish(CheckpointState(1, 8, "run"), put(b"weights"))
    open_storage(root).write(f"{published.name}/{checkpoints.STATE}", b"weightz")
    with (
        pytest.raises(StorageError, match="is damaged: its checksum differs"),
        published.opened(checkpoints.STATE),
    ):
        pass


@pytest.mark.parametrize("split", [2**30, 1], ids=["whole", "parts"])
def test_a_state_is_read_in_the_pass_that_verifies_it(
    root: str, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a remote checkpoint is at hand when the files are gone; files in a folder are mapped."""
    monkeypatch.setattr(checkpoints, "SPLIT_BYTES", split)
    monkeypatch.setattr(state_files, "INLINE_BYTES", 2**8)
    weights, moments = torch.arange(999.0), torch.arange(500.0)
    state = {"network": {"w": weights}, "optimizer": {"m": moments}}
    publish = partial(
        CheckpointStore(root).publish,
        CheckpointState(1, 8, "run"),
        lambda folder: write_state(folder, state, TensorFile(state["network"], {})),
    )
    publish()
    found, damaged = CheckpointStore(root).newest(keep=True)
    assert found is not None
    assert damaged == []
    # Another rank, to which the checkpoint is sent, reads for itself.
    sent = pickle.loads(pickle.dumps(found))
    assert (sent.files, sent.kept.contents, sent.kept.copies) == (found.files, {}, {})
    with opened_state(sent) as read:
        assert torch.equal(read["optimizer"]["m"], moments)
    for file in found.files:
        if root.startswith("s3:"):
            found.storage.remove(f"{found.name}/{file}")
    with opened_state(found) as read:
        assert torch.equal(read["network"]["w"], weights)
        assert torch.equal(read["optimizer"]["m"], moments)
        assert read.keys() == state.keys()
    assert (found.kept.contents, found.kept.copies) == ({}, {})
    publish()
    for file in found.files:
        path = f"{found.name}/{file}"
        content = found.storage.read(path)
        found.storage.write(path, content[:-1] + bytes([content[-1] ^ 1]))
        none, (sentence,) = CheckpointStore(root).newest(keep=True)
        assert none is None
        assert sentence == f"{found.name} is damaged ({file}): going back to the one before it."
        found.storage.write(path, content)


def test_the_best_checkpoint_there_is_is_kept_beside_the_newest(root: str) -> None:
    for step in range(1, 7):
        CheckpointStore(root).publish(CheckpointState(step, 8 * step, "run"), put(b"weights"))
        CheckpointStore(root).prune(keep=2, ranking=[9, 2, 1])
    assert steps(root) == [2, 5, 6]


def test_a_checkpoint_removed_while_all_are_listed_is_left_out(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        CheckpointStore(root).publish(CheckpointState(step, step, "run"), put(b"state"))
    storage = open_storage(root)
    before = storage.names()
    storage.remove(f"step-00000001/{checkpoints.RECORD}")
    monkeypatch.setattr(type(storage), "names", lambda _: before)
    assert [checkpoint.state.step for checkpoint in CheckpointStore(root).published()] == [2]


def test_nan_is_never_the_best_evaluation() -> None:
    evaluations = [{"step": 1, "fd": float("nan")}, {"step": 2, "fd": 3.0}, {"step": 3, "fd": 4.0}]
    assert checkpoints.best_evaluation(evaluations, "fd", "min") == evaluations[1]
    assert checkpoints.best_evaluation(evaluations, "fd", "max") == evaluations[2]
    assert checkpoints.best_evaluation(evaluations[:1], "fd", "min") is None


def test_a_short_outage_of_the_storage_only_delays_a_checkpoint(bucket: str, server: S3Server) -> None:
    wire = Wire(server.port)
    messages: list[str] = []
    through = bucket.replace(str(server.port), str(wire.port))
    saver = AsyncCheckpointer(CheckpointStore(through), keep=2, patience=60, log=messages.append)
    wire.cut_after = 0
    saver.submit(CheckpointState(1, 8, "run"), [], put(b"weights"))
    time.sleep(1)
    assert steps(bucket) == []
    wire.cut_after = None
    saver.close()
    wire.close()
    assert steps(bucket) == [1]
    assert "trying again" in messages[0]
    assert "succeeded after" in messages[1]


@pytest.mark.parametrize("split", [2**30, 1], ids=["whole", "parts"])
def test_a_trial_with_checkpoints_in_s3_trains_the_same_numbers(
    worker: Make, bucket: str, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with a trial that keeps them on disk."""
    local, remote = worker("local"), worker("remote", f"training.checkpoints='{bucket}'")
    local.run()
    monkeypatch.setattr(checkpoints, "SPLIT_BYTES", split)
    monkeypatch.setattr("soflow_platform.training.state_files.INLINE_BYTES", 2**8)
    remote.run()
    assert remote.setup.checkpoints.root.startswith("s3://runs/")
    assert "/sweep/remote?" in remote.setup.checkpoints.root
    assert (
        differing_tensors(
            final_state(local.setup.checkpoints.root), final_state(remote.setup.checkpoints.root)
        )
        == []
    )
    again = worker("remote", f"training.checkpoints='{bucket}'")
    again.resume()
    assert (again.train_step.step, again.loader.consumed) == (6, 48)


@pytest.mark.parametrize("where", ["scratch folder", "published file", "record"])
def test_a_disk_that_is_full_is_said_wherever_it_is_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Before the first file is written, when they are moved to their place, and with the last bytes."""
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    store.publish(CheckpointState(1, 8, "run"), put(b"state"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

    place = {"scratch folder": (Path, "mkdir"), "published file": (os, "replace"), "record": (os, "fsync")}[
        where
    ]
    monkeypatch.setattr(*place, full)
    with pytest.raises(StorageError, match=rf"no space is left on the disk of {tmp_path}/checkpoints\."):
        store.publish(CheckpointState(2, 16, "run"), put(b"state"))
    monkeypatch.undo()
    assert [each.state.step for each in store.published()] == [1]
