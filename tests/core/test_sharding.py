"""A network sharded over two ranks trains like an unsharded one, and saves the same states."""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from soflow_core.gradient_sync import FSDP, Local
from soflow_core.guidance import Guidance
from soflow_core.host_copy import HostCopy
from soflow_core.objectives import (
    Batch,
    Draws,
    ExplicitShortcut,
    ImprovedMeanFlow,
    MeanFlow,
    Objective,
    Shortcut,
    SoFlow,
)
from soflow_core.optimizer import OptimizerConfig
from soflow_core.sharding import local, shard
from soflow_core.step_record import StepRecord
from soflow_core.train_step import TrainStep, TrainStepConfig
from tests.support.gloo_ranks import WORLD, rank_rows, run_ranks
from tests.support.random_networks import random_inputs, random_network

GUIDED = SoFlow(guidance=Guidance(scale=3.0, mix=0.25, drop=0.3))
TOTAL, HALF = 4, 2
Plain = dict[str, tuple[list[StepRecord], dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]]
"""Case -> records, half-way state, final state and EMA state of one process."""
Shards = dict[str, list[Any]]
"""Case -> what each rank saved."""


@dataclass(frozen=True)
class Case:
    """A training and its rows; of 4 rows 3 are velocity rows, so that one rank has no other row."""

    objective: Objective = GUIDED
    rows: int = 16
    optimizer: str = "adamw"
    settings: dict[str, Any] = field(default_factory=dict)
    alone: dict[str, Any] = field(default_factory=dict)
    """Settings of the single process that replace those of the ranks."""
    checkpoint_blocks: bool = False

    def make(self, sharded: bool = False) -> TrainStep:
        network = random_network(torch.float32)
        network.checkpoint_blocks = self.checkpoint_blocks
        # The gradient of a key's bias is 0 but for rounding, which a smaller eps would turn into full steps.
        optimizer = OptimizerConfig(name=self.optimizer, lr=1e-3, eps=1e-4, warmup_steps=2)
        settings = {"precision": "float32"} | self.settings | ({} if sharded else self.alone)
        config = TrainStepConfig(TOTAL, optimizer, ema_decays=(0.9,), **settings)
        return TrainStep(network, self.objective, config, FSDP() if sharded else Local())

    def inputs(self, step: int) -> tuple[Batch, Draws]:
        return random_inputs(self.objective, self.rows, torch.float32, seed=step)


CASES = {
    "guided": Case(),
    "clipped, in pieces, blocks recomputed": Case(
        settings={"clip_norm": 0.1, "accumulate": 2, "power_ema_widths": (0.1,)},
        optimizer="radam",
        checkpoint_blocks=True,
    ),
    # In pieces that are the ranks' rows one process rounds to bfloat16 as the ranks do.
    "mixed, unlike branches": Case(rows=4, settings={"precision": "mixed"}, alone={"accumulate": WORLD}),
    "Jacobian-vector product, unlike branches": Case(MeanFlow(), rows=4),
    "own velocity, unlike branches": Case(ImprovedMeanFlow(flow_matching_share=0.75), rows=4),
    "images of all ranks": Case(ExplicitShortcut(plug_in_share=0.8, zero_steps=8, warmup_steps=8)),
    "teacher, unlike branches": Case(Shortcut(bootstrap_share=0.25, teacher_ema=0.5), rows=4),
}


def _train_shards(rank: int, folder: str) -> None:
    """Every case twice: from the start, with a step that one rank refuses, and from the whole network's
    state.
    """
    for name, case in CASES.items():
        train = case.make(sharded=True)
        assert all(isinstance(p, DTensor) and local(p).numel() < p.numel() for p in train.parameters)
        copy = HostCopy()
        found: dict[str, Any] = {"records": []}
        for step in range(TOTAL):
            if step == HALF:
                found["half"] = deepcopy(train.state_dict())
                found["host"] = train.host_state(copy)
                batch, draws = rank_rows(case.inputs(HALF), rank)
                batch.x0[0] *= float("nan") if rank == 1 else 1
                found["refused"] = vars(train(batch, draws))
            found["records"].append(vars(train(*rank_rows(case.inputs(step), rank))))
        found |= {"end": train.state_dict(), "ema": train.ema_state(), "host ema": train.host_ema_state()}
        for start, state in (("own", found["half"]), ("plain", torch.load(f"{folder}/plain {name}.pt"))):
            resumed = case.make(sharded=True)
            resumed.load_state_dict(state)
            for step in range(HALF, TOTAL):
                resumed(*rank_rows(case.inputs(step), rank))
            found[f"from {start}"] = resumed.state_dict()
        torch.save(found, f"{folder}/{name} {rank}.pt")
    torch.save(_messages(rank), f"{folder}/messages {rank}.pt")


def _messages(rank: int) -> list[str]:
    """The refusal of a network that is sharded already, and the culprit of a gradient broken on one rank."""
    with pytest.raises(ValueError, match="wrapped for several ranks already") as refused:
        TrainStep(shard(random_network(torch.float32)), GUIDED, TrainStepConfig(TOTAL))
    train = Case().make(sharded=True)
    if rank == 1:
        bias = train.module.final_layer.linear.bias
        bias.register_post_accumulate_grad_hook(lambda p: local(p.grad).fill_(float("nan")))
    record = train(*rank_rows(Case().inputs(0), rank))
    return [str(refused.value), str(record.culprit)]


@pytest.fixture(scope="module")
def plain() -> Plain:
    """Trains every case in one process."""
    made = {}
    for name, case in CASES.items():
        train = case.make()
        records = [train(*case.inputs(step)) for step in range(HALF)]
        half = train.host_state()
        records += [train(*case.inputs(step)) for step in range(HALF, TOTAL)]
        made[name] = records, half, train.state_dict(), train.ema_state()
    return made


@pytest.fixture(scope="module")
def shards(plain: Plain, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Trains every case on two ranks."""
    folder = tmp_path_factory.mktemp("shards")
    for name, (_, half, _, _) in plain.items():
        torch.save(half, folder / f"plain {name}.pt")
    run_ranks(_train_shards, str(folder))
    return {
        name: [torch.load(folder / f"{name} {r}.pt") for r in range(WORLD)] for name in (*CASES, "messages")
    }


def assert_same_state(found: Any, expected: Any, exact: bool = False) -> None:
    """The same nesting and keys, equal plain values, and tensors equal or near."""
    if isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor
        assert_close(found, expected, **({"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 2e-5}))
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same_state(found[key], expected[key], exact)
    else:
        assert found == expected


every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_losses_norms_and_final_state_are_those_of_one_process(
    name: str, plain: Plain, shards: Shards
) -> None:
    records, _, end, _ = plain[name]
    for step, whole in enumerate(records):
        ranks = [found["records"][step] for found in shards[name]]
        assert sum(r["loss"] for r in ranks) / WORLD == pytest.approx(whole.loss, rel=1e-4)
        assert ranks[0]["grad_norm"] == ranks[1]["grad_norm"] == pytest.approx(whole.grad_norm, rel=1e-3)
        assert {r["learning_rate"] for r in ranks} == {whole.learning_rate}
    for found in shards[name]:
        assert_same_state(found["end"], end)


@every_case
def test_a_training_goes_on_as_it_would_have_from_shards_to_shards(name: str, shards: Shards) -> None:
    """Bit for bit, past a step that was refused and so changed nothing."""
    for found in shards[name]:
        assert_same_state(found["from own"], found["end"], exact=True)


@every_case
def test_a_training_goes_on_from_one_process_to_shards_and_back(
    name: str, plain: Plain, shards: Shards
) -> None:
    end = plain[name][2]
    for found in shards[name]:
        assert_same_state(found["from plain"], end)
    alone = CASES[name].make()
    alone.load_state_dict(shards[name][0]["half"])
    for step in range(HALF, TOTAL):
        alone(*CASES[name].inputs(step))
    assert_same_state(alone.state_dict(), end)


@every_case
def test_states_for_the_host_are_whole_on_the_first_rank_alone(
    name: str, plain: Plain, shards: Shards
) -> None:
    first, second = shards[name]
    assert_same_state(first["host"], first["half"], exact=True)
    assert_same_state(first["host ema"], first["ema"], exact=True)
    assert_same_state(first["ema"], plain[name][3])
    assert (second["host"], second["host ema"]) == ({}, {})


@every_case
def test_what_is_not_finite_on_one_rank_is_refused_on_both(name: str, shards: Shards) -> None:
    refused = [found["refused"] for found in shards[name]]
    assert [(r["finite"], r["step"]) for r in refused] == [(False, HALF)] * WORLD
    # Where images are compared every rank meets the one that is not finite.
    met = CASES[name].objective.compares_images
    assert refused[0]["culprit"] == ("velocity_mse" if met else "gradients of all parameters")
    assert refused[1]["culprit"].endswith(("_loss", "_mse"))


def test_both_ranks_name_a_share_that_is_broken_on_one(shards: Shards) -> None:
    assert shards["messages"][0] == shards["messages"][1]
    refusal, culprit = shards["messages"][0]
    assert "pass the plain one, and its wrapper as sync" in refusal
    assert culprit == "gradient of final_layer.linear.bias"


def test_sharding_without_other_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="init_process_group first"):
        shard(random_network(torch.float32))


def _compile_shards(rank: int, folder: str) -> None:
    trains = [replace(Case(), settings={"compile": c}).make(sharded=True) for c in (False, True)]
    losses, graphs = [], []
    for step in range(TOTAL):
        losses.append([train(*rank_rows(Case().inputs(step), rank)).loss for train in trains])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch.save((losses, graphs), f"{folder}/compiled {rank}.pt")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_blocks_give_the_same_losses_and_are_not_compiled_again(tmp_path: Path) -> None:
    """Losses agree to 2e-5 relative; all blocks share what is compiled for one."""
    run_ranks(_compile_shards, str(tmp_path))
    for rank in range(WORLD):
        losses, graphs = torch.load(tmp_path / f"compiled {rank}.pt")
        for plain_loss, compiled_loss in losses:
            assert compiled_loss == pytest.approx(plain_loss, rel=2e-5)
        assert 0 < graphs[0] <= 4
        assert len(set(graphs)) == 1, graphs
