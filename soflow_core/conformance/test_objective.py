"""The contract of a training method, for every registered one or those of `--objective`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_core.host_copy import map_tensors
from soflow_core.networks import DiTConfig, NetworkModule
from soflow_core.nfe import sampling_evaluations, training_evaluations
from soflow_core.objectives import OBJECTIVES, Batch, Draws, Objective
from soflow_core.optimizer import OptimizerConfig
from soflow_core.passes import PassPolicy
from soflow_core.random_source import CounterSource
from soflow_core.recorded_passes import on_device
from soflow_core.settings import to_dict
from soflow_core.train_step import TrainStep, TrainStepConfig

SHAPE, CLASSES, ROWS, TOTAL = (2, 4, 4), 3, 12, 20
STEPS = (0, 7, TOTAL - 1)
"""Finished steps at which losses are taken: schedules differ there."""


@pytest.fixture
def objective(objective_class: type[Objective]) -> Objective:
    return objective_class()


def network_for(objective: Objective, conditional: bool = True, seed: int = 0) -> NetworkModule:
    """A small DiT with the conditions that the method declares, and random weights."""
    config = DiTConfig.example(
        **dict(zip(("channels", "height", "width"), SHAPE, strict=True)),
        classes=CLASSES if conditional else None,
        null_label=conditional and objective.needs_null_label,
        guidance_scale=conditional and objective.conditions_on_scale,
        guidance_interval=conditional and objective.conditions_on_interval,
        velocity_blocks=int(objective.uses_velocity_head),
    )
    return filled(config.build(), seed)


def filled(network: NetworkModule, seed: int) -> NetworkModule:
    """The network with random weights: initial ones may make a network that ignores its inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return network


def draws_of(objective: Objective, conditional: bool = True, seed: int = 0, rows: int = ROWS) -> Draws:
    return objective.draw(torch.Generator().manual_seed(seed), rows, SHAPE, conditional)


def batch_of(conditional: bool = True, seed: int = 0, rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(100 + seed)
    labels = torch.randint(CLASSES, (rows,), generator=generator) if conditional else None
    return Batch(torch.randn(rows, *SHAPE, generator=generator), labels)


def train_step(objective: Objective, **settings: Any) -> TrainStep:
    usual = {"optimizer": OptimizerConfig(lr=1e-3, eps=1e-4), "ema_decays": (0.9,), "precision": "float32"}
    return TrainStep(network_for(objective), objective, TrainStepConfig(TOTAL, **{**usual, **settings}))


def tensors_of(draws: Draws) -> dict[str, Tensor]:
    return {name: value for name, value in vars(draws).items() if isinstance(value, Tensor)}


def test_settings_survive_a_header(objective: Objective) -> None:
    assert OBJECTIVES.read(json.loads(json.dumps(to_dict(objective)))) == objective
    assert hash(objective) == hash(type(objective)())


@pytest.mark.parametrize("conditional", [True, False])
def test_draws_have_the_shapes_and_times_of_the_contract(objective: Objective, conditional: bool) -> None:
    draws = draws_of(objective, conditional)
    assert draws.noise.shape == (ROWS, *SHAPE)
    assert draws.t.shape == draws.s.shape == (ROWS,)
    assert all(tensor.device.type == "cpu" and len(tensor) == ROWS for tensor in tensors_of(draws).values())
    assert {draws.noise.dtype, draws.t.dtype, draws.s.dtype} == {torch.float32}
    assert 0 <= draws.velocity_rows <= ROWS
    assert torch.isfinite(draws.t).all()
    assert (draws.s <= draws.t).all()
    if not conditional:
        assert draws.dropped is None, "unconditional training drops no labels"


def test_draws_are_a_function_of_the_generator_alone(objective: Objective) -> None:
    before = torch.get_rng_state()
    one, other = tensors_of(draws_of(objective)), tensors_of(draws_of(objective))
    assert torch.equal(before, torch.get_rng_state()), "draw takes randomness from the generator it is given"
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["noise"], draws_of(objective, seed=1).noise)


def test_a_rank_draws_its_rows_of_the_batch_by_counters(objective: Objective) -> None:
    if not objective.draws_by_rows:
        pytest.skip("a method with its own `draw` is drawn by generators")
    whole = objective.draw_from(CounterSource(7, 3, ROWS), SHAPE, conditional=True)
    for rank in range(3):
        own = objective.draw_from(CounterSource(7, 3, ROWS, rank, 3), SHAPE, conditional=True)
        expected = whole.rows(rank, 3)
        assert own.velocity_rows == expected.velocity_rows
        assert tensors_of(own).keys() == tensors_of(expected).keys()
        assert all(torch.equal(tensors_of(own)[name], value) for name, value in tensors_of(expected).items())


@pytest.mark.parametrize("step", STEPS)
def test_a_loss_draws_nothing_and_its_gradients_are_finite(objective: Objective, step: int) -> None:
    train = train_step(objective)
    train.step = step
    before = torch.get_rng_state()
    losses = []
    for _ in range(2):
        result = objective.loss(train.network, batch_of(), draws_of(objective), step, TOTAL, train.policy)
        assert result.loss.shape == ()
        assert result.loss.dtype == torch.float32
        assert all(not term.requires_grad and term.isfinite() for term in result.terms.values())
        losses.append(result.loss.item())
        result.loss.backward()
    assert losses[0] == losses[1]
    assert torch.equal(before, torch.get_rng_state()), "all randomness of a step is in its draws"
    gradients = [p.grad for p in train.parameters if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)
    assert any(g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_have_the_loss_and_gradient_of_one_process(objective: Objective, ranks: int) -> None:
    """Each rank takes every n-th row, and gradients are averaged."""
    batch, draws, step = batch_of(), draws_of(objective), STEPS[1]
    results = []
    for parts in (1, ranks):
        train = train_step(objective)
        loss = torch.zeros(())
        for rank in range(parts):
            rows = batch.rows(rank, parts), draws.rows(rank, parts)
            loss = loss + objective.loss(train.network, *rows, step, TOTAL, train.policy).loss / parts
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in train.parameters if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        assert_close(other, one, rtol=1e-3, atol=1e-4)


def test_a_loss_takes_what_changes_between_the_steps_of_a_phase_from_its_schedules(
    objective: Objective,
) -> None:
    """As a recorded step is replayed with the values of a later one."""
    said = [objective.schedules(step, TOTAL) for step in range(TOTAL)]
    if said[0] is None:
        pytest.skip("the method does not say what changes from step to step, and its steps are not recorded")
    network, inputs = network_for(objective), (batch_of(), draws_of(objective))
    phases = [objective.phase(step, TOTAL) for step in range(TOTAL)]
    for phase in set(phases):
        first, last = phases.index(phase), TOTAL - 1 - phases[::-1].index(phase)
        values = said[last]
        assert values is not None
        policy = PassPolicy(skip_unused=False, schedules=on_device(values, torch.device("cpu")))
        replayed = objective.loss(network, *inputs, first, TOTAL, policy)
        expected = objective.loss(network, *inputs, last, TOTAL, PassPolicy(skip_unused=False))
        for loss in (replayed, expected):
            loss.terms["loss"] = loss.loss
        assert_close(replayed.terms, expected.terms, rtol=1e-4, atol=1e-5)


def test_rows_that_are_skipped_do_not_change_the_loss(objective: Objective) -> None:
    network = network_for(objective)
    losses = [
        objective.loss(network, batch_of(), draws_of(objective), 7, TOTAL, PassPolicy(skip_unused=skip)).loss
        for skip in (True, False)
    ]
    assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


def test_sharded_ranks_make_the_same_passes(objective: Objective) -> None:
    """Every pass of a sharded network is a collective: a rank whose rows need none must make it all the same."""
    network, draws, batch = network_for(objective), draws_of(objective), batch_of()
    policy, counts = PassPolicy(uniform=True), []
    for rank in range(ROWS // 2):
        calls: list[int] = []
        handle = network.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        rows = batch.rows(rank, ROWS // 2), draws.rows(rank, ROWS // 2)
        objective.loss(network, *rows, 7, TOTAL, policy)
        handle.remove()
        counts.append(calls)
    assert all(calls == counts[0] for calls in counts)


def test_it_trains_without_labels(objective: Objective) -> None:
    network = network_for(objective, conditional=False)
    loss = objective.loss(network, batch_of(False), draws_of(objective, False), 3, TOTAL).loss
    loss.backward()
    assert loss.isfinite()


def test_a_training_goes_on_from_its_state_bit_for_bit(objective: Objective) -> None:
    whole, resumed = train_step(objective), train_step(objective)
    for step in range(2):
        whole(batch_of(seed=step), draws_of(objective, seed=step))
    resumed.load_state_dict(whole.state_dict())
    for train in (whole, resumed):
        train(batch_of(seed=2), draws_of(objective, seed=2))
    states: list[list[Tensor]] = [[], []]
    for train, tensors in zip((whole, resumed), states, strict=True):
        map_tensors(train.state_dict(), tensors.append)
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@pytest.mark.slow
def test_a_compiled_training_has_the_losses_of_an_eager_one(objective: Objective) -> None:
    torch._dynamo.reset()
    plain, compiled = train_step(objective), train_step(objective, compile=True)
    for step in range(2):
        losses = [
            train(batch_of(seed=step), draws_of(objective, seed=step)).loss for train in (plain, compiled)
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_sample_depends_on_its_noise_and_label_alone(objective: Objective, steps: int) -> None:
    network, generator = network_for(objective), torch.Generator().manual_seed(0)
    noise, *renoise = (torch.randn(4, *SHAPE, generator=generator) for _ in range(steps))
    labels, before = torch.tensor([0, 1, 2, 1]), torch.get_rng_state()
    samples = objective.sample(network, noise, labels, steps, renoise)
    assert samples.shape == noise.shape
    assert samples.isfinite().all()
    alone = objective.sample(network, noise[1:3], labels[1:3], steps, [each[1:3] for each in renoise])
    assert_close(alone, samples[1:3], rtol=1e-3, atol=1e-4)
    assert torch.equal(before, torch.get_rng_state()), "noise between steps is `renoise`"


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_evaluations_are_counted_as_they_are_made(objective: Objective, steps: int) -> None:
    network, rows = network_for(objective), []
    network.register_forward_hook(lambda *passed: rows.append(len(passed[-1])))
    noise = [torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(n)) for n in range(steps)]
    objective.sample(network, noise[0], torch.tensor([1]), steps, noise[1:])
    assert sum(rows) == sampling_evaluations(objective, steps) >= 1
    assert training_evaluations(objective, 64) >= 1
