"""A second head of the DiT predicts the velocity; improved MeanFlow trains it and takes its own velocity from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from soflow_core.conformance import test_network as network_suite
from soflow_core.conformance import test_objective as objective_suite
from soflow_core.guidance import IntervalGuidance, ScaleRange, drop_labels
from soflow_core.initial_weights import start_from
from soflow_core.networks import DiT, DiTConfig
from soflow_core.nfe import training_calls, training_evaluations
from soflow_core.objectives import Batch, Draws, ImprovedMeanFlow, SoFlow
from soflow_core.optimizer import OptimizerConfig
from soflow_core.passes import Head, PassPolicy
from soflow_core.rows import row_sum
from soflow_core.sharding import shard
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_core.weights import Weights
from tests.support.random_networks import CONFIG, gradient, random_inputs

HEADED = replace(CONFIG, depth=3, velocity_blocks=2)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"qk_norm": True, "rope": True, "swiglu": True, "registers": 3, "condition_tokens": 2},
}
HEADS: tuple[Head, ...] = ("average", "velocity", "both")


def headed(config: DiTConfig = HEADED, dtype: torch.dtype = torch.float64) -> DiT:
    network = objective_suite.filled(config.build(), seed=0).to(dtype)
    assert isinstance(network, DiT)
    return network


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, t, s, labels = network_suite.inputs(dtype)
    return x[:, :, :4, :4], t, s, labels


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", OPTIONS)
def test_parameters_and_flops_are_those_of_the_network(options: str) -> None:
    config = replace(HEADED, **OPTIONS[options])
    network = config.build()
    assert config.parameters() == sum(p.numel() for p in network.parameters())
    assert config.trained_parameters() == sum(p.numel() for p in network.parameters() if p.requires_grad)

    def counted(head: Head) -> float:
        x, t, s, labels = (each[:1].float() if each.is_floating_point() else each[:1] for each in inputs())
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(x, t, s, labels, None, head)
        return float(counter.get_total_flops())

    assert counted("average") == counted("velocity") == config.forward_flops()
    assert counted("both") == config.forward_flops() + config.second_head_flops()
    assert config.small().has_velocity_head


@pytest.mark.parametrize("options", OPTIONS)
def test_the_first_head_is_the_network_without_the_second(options: str) -> None:
    config = replace(HEADED, **OPTIONS[options])
    network, plain = headed(config), headed(replace(config, velocity_blocks=0))
    own = {name: tensor for name, tensor in network.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(own)
    average, velocity, both = (network(*inputs(), None, head) for head in HEADS)
    assert torch.equal(average, plain(*inputs()))
    assert_close(both, torch.cat([average, velocity], dim=1), rtol=0, atol=1e-12)
    assert not torch.allclose(average, velocity)
    added = set(network.state_dict()) - set(own)
    assert {name.split(".")[0] for name in added} == {"velocity_blocks", "velocity_layer"}


def test_gradients_reach_both_heads_and_recomputed_blocks_have_the_same() -> None:
    gradients = []
    for recompute in (False, True):
        network = headed()
        network.checkpoint_blocks = recompute
        network(*inputs(), None, "both").square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    assert all(g is not None and g.any() for g in gradients[0])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_sharded_network_has_the_outputs_of_a_whole_one(one_rank: None) -> None:
    del one_rank
    network = headed(dtype=torch.float32)
    arguments = inputs(torch.float32)
    whole = [network(*arguments, None, head).detach() for head in HEADS]
    sharded = shard(network)
    for head, expected in zip(HEADS, whole, strict=True):
        assert_close(sharded(*arguments, None, head).detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="no head for the velocity; build it with velocity_blocks"):
        headed(CONFIG)(*inputs(), None, "velocity")
    with pytest.raises(ValueError, match="velocity_blocks is 4; it must be from 0 to the depth, 3"):
        replace(HEADED, velocity_blocks=4)
    for network, objective in (
        (headed(CONFIG), ImprovedMeanFlow(velocity_head=True)),
        (headed(), ImprovedMeanFlow()),
        (headed(), SoFlow()),
    ):
        with pytest.raises(ValueError, match="set velocity_head of the method and velocity_blocks of the"):
            TrainStep(network.float(), objective, TrainStepConfig(10))


def two_head_loss(objective: ImprovedMeanFlow, network: DiT, batch: Batch, draws: Draws) -> Tensor:
    """A(|V - v_g|^2) + A(|v(x, t, s) - v_g|^2), V = u + (t - s) sg(du/dt) along v(x, t, t), with a quotient for du/dt."""
    t, s, labels, guidance, h = draws.t, draws.s, batch.labels, objective.guidance, 1e-5
    column = (-1, 1, 1, 1)
    x_t = (1 - t).reshape(column) * batch.x0 + t.reshape(column) * draws.noise
    v_g = draws.noise - batch.x0
    seen = None if labels is None else drop_labels(labels, draws.dropped)
    with torch.no_grad():
        own = network(x_t, t, t, seen, None, "velocity")
        ahead, behind = (network(x_t + step * own, t + step, s, seen) for step in (h, -h))
        if labels is not None and guidance.active:
            unconditional = network(x_t, t, t, None, None, "velocity")
            inside = (t >= guidance.start) & (t <= guidance.end) & ~draws.dropped
            guided = v_g + (1 - 1 / guidance.scale) * (own - unconditional)
            v_g = torch.where(inside.reshape(column), guided, v_g)
    u = network(x_t, t, s, seen)
    v = network(x_t, t, s, seen, None, "velocity")
    errors = (
        row_sum((u + (t - s).reshape(column) * (ahead - behind) / (2 * h) - v_g).square()),
        row_sum((v - v_g).square()),
    )
    return sum(
        (e / (e.detach() + objective.weight_eps) ** objective.weight_power).mean() for e in errors
    ) + torch.zeros(())


@pytest.mark.parametrize(
    "guidance",
    [IntervalGuidance(), IntervalGuidance(2.5, start=0.3, end=0.7, drop=0.4)],
    ids=["plain", "interval"],
)
@pytest.mark.parametrize("conditional", [True, False], ids=["labels", "no labels"])
def test_the_loss_of_two_heads_is_its_definition(guidance: IntervalGuidance, conditional: bool) -> None:
    objective = ImprovedMeanFlow(
        guidance=guidance, flow_matching_share=0.25, weight_power=0.75, velocity_head=True
    )
    network = headed()
    batch, draws = random_inputs(objective, conditional=conditional, seed=2)
    expected = two_head_loss(objective, network, batch, draws)
    for policy in (PassPolicy(), PassPolicy(skip_unused=False), PassPolicy(uniform=True)):
        found = objective.loss(network, batch, draws, 0, 1, policy)
        assert_close(found.loss, expected, rtol=1e-7, atol=0)
        assert_close(gradient(found.loss, network), gradient(expected, network), rtol=1e-5, atol=1e-8)
        assert set(found.terms) == {"velocity_mse", "average_mse", "head_mse"}


def test_without_the_head_a_network_is_given_no_head() -> None:
    """The setting's default calls the network as before: with five arguments at the most."""
    calls: list[int] = []

    def network(*arguments: Any) -> Tensor:
        calls.append(len(arguments))
        return arguments[0] * torch.ones((), dtype=torch.float64, requires_grad=True)

    objective = ImprovedMeanFlow(derivative="finite_difference", guidance=IntervalGuidance(3.0))
    objective.loss(network, *random_inputs(objective), 0, 1)
    assert set(calls) == {4}


def test_the_passes_of_two_heads_are_counted() -> None:
    plain, two = ImprovedMeanFlow(), ImprovedMeanFlow(velocity_head=True)
    ((_, calls),) = training_calls(two, 64)
    assert [call.head for call in calls if call.gradient] == ["both"]
    assert {call.head for call in calls if call.tangent} == {"average"}
    assert {call.head for call in calls if not call.gradient and not call.tangent} == {"velocity"}
    # The second head's own layers come on top, by the network.
    assert training_evaluations(two, 64) == training_evaluations(plain, 64)


@pytest.mark.parametrize(
    "objective",
    [
        ImprovedMeanFlow(velocity_head=True),
        ImprovedMeanFlow(velocity_head=True, guidance=IntervalGuidance(ScaleRange(1.0, 8.0))),
    ],
    ids=["plain", "range of scales"],
)
def test_it_conforms_as_a_method(objective: ImprovedMeanFlow) -> None:
    for step in objective_suite.STEPS:
        objective_suite.test_a_loss_draws_nothing_and_its_gradients_are_finite(objective, step)
    objective_suite.test_ranks_have_the_loss_and_gradient_of_one_process(objective, 3)
    objective_suite.test_rows_that_are_skipped_do_not_change_the_loss(objective)
    objective_suite.test_sharded_ranks_make_the_same_passes(objective)
    objective_suite.test_a_training_goes_on_from_its_state_bit_for_bit(objective)
    objective_suite.test_a_sample_depends_on_its_noise_and_label_alone(objective, 2)
    objective_suite.test_evaluations_are_counted_as_they_are_made(objective, 2)


def test_the_head_starts_as_a_copy_of_the_last_blocks() -> None:
    old = headed(replace(HEADED, velocity_blocks=0), torch.float32)
    network = HEADED.build()
    found = start_from(network, Weights(old.config, SoFlow(), {}, old.state_dict()), "improved_meanflow")
    assert found.notes == (
        "the head for the velocity is new, a copy of the last blocks and the output layer",
    )
    arguments = inputs(torch.float32)
    average, velocity = (network(*arguments, None, head) for head in ("average", "velocity"))
    assert torch.equal(average, old(*arguments))
    assert torch.equal(velocity, average)
    without = replace(HEADED, velocity_blocks=0).build()
    headed_weights = Weights(network.config, ImprovedMeanFlow(), {}, network.state_dict())
    found = start_from(without, headed_weights, "soflow")
    assert found.notes == ("there is no head for the velocity any longer",)
    assert torch.equal(without(*arguments), average)


def test_both_heads_learn() -> None:
    objective = ImprovedMeanFlow(velocity_head=True)
    network = headed(dtype=torch.float32)
    step = TrainStep(network, objective, TrainStepConfig(60, OptimizerConfig(lr=1e-2), precision="float32"))
    batch, draws = random_inputs(objective, dtype=torch.float32)
    records = [step(batch, draws) for _ in range(15)]
    for term in ("head_mse", "average_mse", "velocity_mse"):
        assert records[-1].terms[term] < 0.8 * records[0].terms[term]
