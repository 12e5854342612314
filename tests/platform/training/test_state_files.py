"""Files of a training's state: in one file or in parts, what is saved is what is read."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from soflow_core.failures import InputError
from soflow_core.host_copy import map_tensors
from soflow_core.weights import load_weights
from soflow_pipelines.storage.files import sha256
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import StorageError
from soflow_platform.storage import checkpoints
from soflow_platform.storage.checkpoints import EMA, STATE, CheckpointState, CheckpointStore
from soflow_platform.training import state_files
from soflow_platform.training.state_files import TensorFile, opened_state, write_state
from soflow_platform.training.worker import Trainer
from tests.platform.training.test_resume import run_until
from tests.support.trained_state import differing_tensors, final_state

Make = Callable[..., Trainer]


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts every state, into parts of a tensor or some."""
    monkeypatch.setattr(checkpoints, "SPLIT_BYTES", 1)
    monkeypatch.setattr(state_files, "PART_BYTES", 2**12)
    monkeypatch.setattr(state_files, "INLINE_BYTES", 2**8)


def small_state() -> tuple[dict[str, Any], TensorFile]:
    generator = torch.Generator().manual_seed(0)

    def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        return {
            f"w{number}": torch.randn(33, 20 + number, generator=generator).to(dtype) for number in range(5)
        }

    state = {
        "step": 3,
        "network": {**tensors(), "fixed": torch.arange(400), "transposed": torch.randn(30, 40).T},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": tensors(torch.bfloat16)["w0"]}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0], "foreach": None}],
        },
        "ema": {"0.9": tensors()},
    }
    return state, TensorFile({**state["network"], **state["ema"]["0.9"]}, {"soflow": '{"a": 1}'})


def flat(state: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(state, found.append)
    return found


def publish(root: Path | str, step: int = 1) -> dict[str, Any]:
    state, weights = small_state()
    CheckpointStore(root).publish(
        CheckpointState(step, 8 * step, "run"), lambda folder: write_state(folder, state, weights)
    )
    return state


@pytest.mark.parametrize("split", [False, True], ids=["one file", "parts"])
def test_a_state_is_read_as_it_was_written(
    tmp_path: Path, split: bool, request: pytest.FixtureRequest
) -> None:
    if split:
        request.getfixturevalue("in_parts")
    state = publish(tmp_path)
    found, damaged = CheckpointStore(tmp_path).newest()
    assert found is not None
    assert damaged == []
    assert any(name.startswith("state-") for name in found.files) is split
    assert found.files == {name: sha256(Path(found.location, name)) for name in found.files}
    with opened_state(found) as read:
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(flat(state), flat(read), strict=True)
        )
        assert map_tensors(read, str) == map_tensors(state, str)
    weights = load_file(Path(found.location, EMA))
    assert torch.equal(weights["w1"], state["ema"]["0.9"]["w1"])
    assert torch.equal(weights["transposed"], state["network"]["transposed"])


@pytest.mark.usefixtures("in_parts")
def test_averaged_weights_are_written_once(tmp_path: Path) -> None:
    state = publish(tmp_path)
    folder = tmp_path / "step-00000001"
    tensors = sum(tensor.nbytes for tensor in flat(state))
    written = sum(path.stat().st_size for path in folder.iterdir())
    assert len(list(folder.glob("state-*.safetensors"))) > 2
    assert tensors < written < tensors + sum(t.nbytes for t in state["ema"]["0.9"].values())


@pytest.mark.usefixtures("in_parts")
def test_a_version_that_knows_no_parts_refuses_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path)
    record = json.loads((tmp_path / "step-00000001" / checkpoints.RECORD).read_text())
    assert record["format"] == 2
    monkeypatch.setattr(checkpoints, "PARTS_FORMAT", 1)
    with pytest.raises(
        InputError, match="is of format 2 and this version of soflow reads 1: use a newer soflow"
    ):
        CheckpointStore(tmp_path).newest()


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("name", ["state-001.safetensors", EMA, STATE])
def test_damage_of_one_part_is_damage_of_the_state(tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        publish(tmp_path, step)
    path = tmp_path / "step-00000002" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found, damaged = CheckpointStore(tmp_path).newest([STATE])
    assert found is not None
    assert found.state.step == 1
    assert damaged == [f"step-00000002 is damaged ({name}): going back to the one before it."]
    (broken,) = [each for each in CheckpointStore(tmp_path).published() if each.state.step == 2]
    with pytest.raises(StorageError, match=f"{name} is damaged"), opened_state(broken):
        pass


class Remote:
    """A folder as the store of a remote checkpoint, of which one file cannot be read."""

    def __init__(self, folder: LocalFolder, lost: str) -> None:
        self.folder, self.lost = folder, lost

    def size(self, name: str) -> int | None:
        return self.folder.size(name)

    def open(self, name: str) -> BinaryIO:
        if name.endswith(self.lost):
            raise StorageError("the store is away")
        return self.folder.open(name)


@pytest.mark.usefixtures("in_parts")
def test_parts_in_memory_are_let_go_where_another_cannot_be_read(tmp_path: Path) -> None:
    """The checkpoint lives on in the error, while all of it is read once more."""
    publish(tmp_path)
    (found,) = CheckpointStore(tmp_path).published()
    remote: Any = Remote(LocalFolder(tmp_path), "state-001.safetensors")
    checkpoint = replace(found, storage=remote)
    with pytest.raises(StorageError, match="the store is away"):
        checkpoint.broken_files(keep=True)
    assert (checkpoint.kept.contents, checkpoint.kept.copies) == ({}, {})


def before_the_second_part(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Have something happen when the second part of a state is about to be written."""
    written = state_files.write_tensors

    def write(path: Path, content: TensorFile) -> str:
        if path.name == "state-001.safetensors":
            action()
        return written(path, content)

    monkeypatch.setattr(state_files, "write_tensors", write)


@pytest.mark.usefixtures("in_parts")
def test_a_process_killed_between_two_parts_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, 1)

    def dies() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    before_the_second_part(monkeypatch, dies)
    child = multiprocessing.get_context("fork").Process(target=publish, args=(tmp_path, 2))
    child.start()
    child.join(20)
    assert child.exitcode == -signal.SIGKILL
    found, damaged = CheckpointStore(tmp_path).newest()
    assert found is not None
    assert (found.state.step, damaged) == (1, [])


@pytest.mark.usefixtures("in_parts")
def test_a_part_that_cannot_be_written_fails_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, 1)

    def fails() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before_the_second_part(monkeypatch, fails)
    with pytest.raises(StorageError, match="no space is left on the disk"):
        publish(tmp_path, 2)
    assert [each.state.step for each in CheckpointStore(tmp_path).published()] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_trial_with_states_in_parts_trains_the_same_numbers(
    worker: Make, request: pytest.FixtureRequest
) -> None:
    """Killed and resumed, and also from a state in one file as versions before wrote it."""
    whole = worker("whole")
    whole.run()
    run_until(worker("moved"), 3)
    request.getfixturevalue("in_parts")
    run_until(worker("moved"), 5)
    again = worker("moved")
    again.run()
    (checkpoint, *_) = reversed(again.setup.checkpoints.published())
    assert len(checkpoint.files_of(STATE)) > 3
    states = [final_state(each.setup.checkpoints.root) for each in (whole, again)]
    assert differing_tensors(*states) == []
    weights = [
        load_weights(Path(each.setup.checkpoints.root, "step-00000006", EMA)) for each in (whole, again)
    ]
    assert weights[0].network_config == weights[1].network_config
    assert differing_tensors(weights[0].tensors, weights[1].tensors) == []
