"""Rows and draws of a step: made ahead, the same for any number of ranks, and of the version that a trial began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soflow_core.objectives import SoFlow
from soflow_core.random_source import CounterSource
from soflow_pipelines.preparation.builtin import ensure_builtin
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.storage.local import LocalFolder
from soflow_platform.errors import JobError
from soflow_platform.storage.checkpoints import RECORD, Checkpoint, CheckpointState
from soflow_platform.training.step_inputs import DeviceInputs, draws_version
from soflow_platform.training.worker import Trainer
from tests.platform.conftest import small_experiment
from tests.platform.training.test_resume import run_until
from tests.support.trained_state import differing_tensors, final_state

Make = Callable[..., Trainer]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
BATCH = 13


def inputs(folder: Path, rank: int = 0, world: int = 1, consumed: int = 0) -> DeviceInputs:
    loader = ShardLoader(ensure_builtin("digits", folder), BATCH, rank, world, seed=2, consumed=consumed)
    shape = tuple(loader.info.shape)

    def draw(step: int):  # type: ignore[no-untyped-def]
        return SoFlow().draw_from(CounterSource(2, step, BATCH, rank, world), shape, conditional=True)

    made = DeviceInputs(loader, 2, True, draw, CPU)
    made.begin(1 + consumed // BATCH)
    return made


def test_ranks_have_the_rows_and_draws_of_one_process_and_resume_in_the_middle(tmp_path: Path) -> None:
    alone = inputs(tmp_path / "digits")
    ranks = [inputs(tmp_path / "digits", rank, 2) for rank in range(2)]
    for step in (1, 2, 3):
        batch, draws = alone.rows(), alone.draws(step)
        assert alone.consumed == step * BATCH, "the batch that is made ahead is not trained on yet"
        for rank, own in enumerate(ranks):
            rows = own.rows()
            assert torch.equal(rows.x0, batch.x0[rank::2])
            assert batch.labels is not None
            assert rows.labels is not None
            assert torch.equal(rows.labels, batch.labels[rank::2])
            assert torch.equal(own.draws(step).noise, draws.noise[rank::2])
    resumed = inputs(tmp_path / "digits", consumed=2 * BATCH)
    assert torch.equal(resumed.rows().x0, batch.x0)
    assert torch.equal(resumed.draws(3).t, draws.t)
    for each in (alone, *ranks, resumed):
        each.close()


def take(made: DeviceInputs, steps: int) -> None:
    for _ in range(steps):
        made.rows()


def test_a_failed_read_raises_where_the_rows_are_taken(tmp_path: Path) -> None:
    made = inputs(tmp_path / "digits")
    made._loader._read = None  # type: ignore[assignment,method-assign]
    with pytest.raises(TypeError):
        take(made, 9)
    made.close()


def test_training_with_counters_goes_on_as_it_began(worker: Make) -> None:
    """Also where the settings no longer name them, and this machine's own choice would be another."""
    whole = worker("whole", "training.draws=counter")
    whole.run()
    run_until(worker("cut", "training.draws=counter"), 3)
    again = worker("cut")
    again.run()
    assert (whole.draws, again.draws) == (2, 2)
    roots = whole.setup.checkpoints.root, again.setup.checkpoints.root
    assert differing_tensors(*map(final_state, roots)) == []
    plain = worker("plain")
    plain.run()
    assert differing_tensors(final_state(roots[0]), final_state(plain.setup.checkpoints.root)) != []


def test_a_checkpoint_that_names_no_version_goes_on_with_generators(worker: Make) -> None:
    whole = worker("whole")
    whole.run()
    run_until(worker("cut"), 3)
    again = worker("cut")
    for path in Path(again.setup.checkpoints.root).glob(f"step-*/{RECORD}"):
        record = json.loads(path.read_text())
        assert record.pop("draws") == 1
        path.write_text(json.dumps(record))
    again.run()
    assert again.step == 6
    roots = whole.setup.checkpoints.root, again.setup.checkpoints.root
    assert differing_tensors(*map(final_state, roots)) == []


def checkpoint(tmp_path: Path, draws: int | None) -> Checkpoint:
    return Checkpoint(LocalFolder(tmp_path), "step-00000002", CheckpointState(2, 16, "run", draws=draws), {})


@pytest.mark.parametrize(
    ("setting", "device", "recorded", "expected"),
    [
        ("auto", CPU, "new", 1),
        ("auto", GPU, "new", 2),
        ("generator", GPU, "new", 1),
        ("counter", CPU, "new", 2),
        ("auto", GPU, None, 1),
        ("auto", GPU, 1, 1),
        ("auto", CPU, 2, 2),
        ("counter", GPU, 2, 2),
        ("generator", GPU, None, 1),
    ],
)
def test_a_checkpoint_decides_and_else_the_setting_or_the_device(
    tmp_path: Path, setting: str, device: torch.device, recorded: int | str | None, expected: int
) -> None:
    began = None if recorded == "new" else checkpoint(tmp_path, recorded)  # type: ignore[arg-type]
    assert draws_version(small_experiment(f"training.draws={setting}"), device, began) == expected


def test_a_mix_and_a_later_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="began with generator, whose numbers are others: set it to auto"):
        draws_version(small_experiment("training.draws=counter"), CPU, checkpoint(tmp_path, None))
    with pytest.raises(JobError, match="later version"):
        draws_version(small_experiment(), CPU, checkpoint(tmp_path, 3))


def test_a_method_with_its_own_draw_is_drawn_by_generators() -> None:
    class Own(SoFlow):
        def draw(self, *arguments):  # type: ignore[no-untyped-def]
            return super().draw(*arguments)

    experiment = small_experiment()
    own = experiment.model_copy(update={"objective": Own()})
    assert draws_version(own, GPU, None) == 1
    counted = own.model_copy(update={"training": own.training.model_copy(update={"draws": "counter"})})
    with pytest.raises(JobError, match="has a `draw` of its own"):
        draws_version(counted, CPU, None)
