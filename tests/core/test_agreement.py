"""Ranks whose gradients are not the same, bit for bit, after the reduction are told so in the first step."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from random_networks import random_inputs, random_network
from ranks import WORLD, average, gather, rank_rows, run_ranks

from soflow_core.agreement import digest, first_difference
from soflow_core.objectives import MeanFlow
from soflow_core.optimizer import OptimizerConfig
from soflow_core.training import TrainStep


def forgets_one(gradients: list[torch.Tensor]) -> None:
    average(gradients[:3] + gradients[4:])


def rounds_on_one_rank(gradients: list[torch.Tensor]) -> None:
    """One unit in the last place of one element."""
    average(gradients)
    if dist.get_rank() == 1:
        last = gradients[-1].view(-1)[-1:]
        last.copy_(torch.nextafter(last, last + 1))


def swaps_two_elements(gradients: list[torch.Tensor]) -> None:
    average(gradients)
    if dist.get_rank() == 0:
        gradients[0].view(-1)[:2] = gradients[0].view(-1)[:2].flip(0)


REDUCTIONS = {
    "right": (average, None),
    "one forgotten": (forgets_one, "the gradient of t_embedder.mlp.0.bias differs"),
    "last bit": (rounds_on_one_rank, "the gradient of final_layer.adaLN_modulation.1.bias differs"),
    "order": (swaps_two_elements, "the gradient of x_embedder.proj.weight differs"),
    "other weights": (
        average,
        "^s_embedder.mlp.2.weight differs between ranks; start all with the same weights",
    ),
}


def _first_steps(rank: int, folder: str) -> None:
    told = {}
    for name, (reduction, _) in REDUCTIONS.items():
        network = random_network(torch.float32)
        if name == "other weights" and rank == 1:
            network.s_embedder.mlp[2].weight.data[0, 0] += 1e-6
        train = TrainStep(
            network, MeanFlow(), OptimizerConfig(), 10, reduce_gradients=reduction, gather=gather
        )
        try:
            for step in range(2):
                train(*rank_rows(random_inputs(train.objective, 8, torch.float32, seed=step), rank))
            told[name] = None
        except RuntimeError as error:
            told[name] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    run_ranks(_first_steps, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_broken_reduction_is_told_on_every_rank_with_the_first_parameter(name, told):
    expected = REDUCTIONS[name][1]
    assert told[0][name] == told[1][name]
    assert told[0][name] is None if expected is None else re.search(expected, told[0][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_a_digest_is_of_the_bits(dtype):
    values = (10 * torch.randn(50, generator=torch.Generator().manual_seed(0))).to(dtype)
    other = values.clone()
    assert torch.equal(digest([values]), digest([other.reshape(5, 10)]))
    other[7] = 1 - other[7] if dtype != torch.bool else ~other[7]
    assert not torch.equal(digest([values]), digest([other]))
    assert first_difference(["a", "b"], [other, values], lambda mine: [mine, digest([other, other])]) == "b"


def test_what_is_not_there_or_not_a_number_has_a_digest():
    assert not torch.equal(digest([None]), digest([torch.zeros(0)]))
    signed = torch.tensor([float("nan"), -float("nan"), 1.0])
    assert torch.equal(digest([signed]), digest([torch.tensor([float("nan"), float("nan"), 1.0])]))
    assert not torch.equal(digest([torch.tensor([0.0])]), digest([torch.tensor([-0.0])]))
