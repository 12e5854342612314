"""Tokens behind a block are aligned with features of the clean image, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from soflow_core.alignment import (
    Alignment,
    AlignmentHead,
    AlignmentTerm,
    alignment_loss,
    head_flops,
    head_parameters,
)
from soflow_core.conformance.test_objective import batch_of, draws_of, filled, network_for, tensors_of
from soflow_core.gradient_sync import DDP
from soflow_core.networks import DiTConfig
from soflow_core.objectives import OBJECTIVES, Batch, Objective, SoFlow
from soflow_core.optimizer import OptimizerConfig
from soflow_core.passes import PassPolicy
from soflow_core.train_step import TrainStep, TrainStepConfig

DIM, BLOCK = 5, 1


def features(x0: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 5): a fixed map."""
    weight = torch.randn(x0[0].numel(), DIM, generator=torch.Generator().manual_seed(7))
    return torch.tanh(x0.flatten(1) @ weight.to(x0))


def parts(x0: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 5, 2, 2): a fixed map of each quarter."""
    blocks = x0.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5)
    return features(blocks.reshape(-1, *blocks.shape[3:])).reshape(len(x0), 2, 2, DIM).permute(0, 3, 1, 2)


def step_of(alignment: Alignment | None = None, lr: float = 1e-3, **settings: Any) -> TrainStep:
    config = TrainStepConfig(20, OptimizerConfig(lr=lr, eps=1e-4), (0.9,), precision="float32", **settings)
    return TrainStep(network_for(SoFlow()), SoFlow(), config, alignment=alignment)


def trained(step: TrainStep, first: int = 0, count: int = 2) -> TrainStep:
    for number in range(first, first + count):
        record = step(batch_of(seed=number), draws_of(SoFlow(), seed=number))
        assert record.finite
    return step


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("whole", [True, False])
def test_the_loss_is_zero_where_projections_are_the_features(whole: bool) -> None:
    tokens = torch.randn(3, 4, DIM, generator=torch.Generator().manual_seed(0))
    target = tokens.mean(dim=1) if whole else tokens.transpose(1, 2).unflatten(2, (2, 2))
    for scale in (1.0, 3.0):
        assert alignment_loss(nn.Identity(), tokens, scale * target, (2, 2)).item() == pytest.approx(
            0, abs=1e-6
        )
    assert alignment_loss(nn.Identity(), tokens, -target, (2, 2)).item() == pytest.approx(2, abs=1e-6)


def test_features_of_parts_are_resized_to_the_grid_of_the_tokens() -> None:
    tokens = torch.randn(2, 4, DIM, generator=torch.Generator().manual_seed(0))
    finer = tokens.transpose(1, 2).unflatten(2, (2, 2)).repeat_interleave(8, 2).repeat_interleave(8, 3)
    coarse = torch.ones(2, DIM, 1, 1)
    assert alignment_loss(nn.Identity(), tokens, finer, (2, 2)) < 0.05
    expected = 1 - torch.nn.functional.cosine_similarity(tokens, torch.ones(DIM), dim=-1).mean()
    assert_close(alignment_loss(nn.Identity(), tokens, coarse, (2, 2)), expected)


@pytest.mark.parametrize("kind", [features, parts])
def test_the_gradient_reaches_the_blocks_before_it_and_no_others(kind: Any) -> None:
    config = replace(network_for(SoFlow()).config, depth=3)
    assert isinstance(config, DiTConfig)
    network = filled(config.build(), seed=0)
    term = AlignmentTerm(Alignment(1.0, 2, kind, DIM), config, seed=0)
    batch, draws = batch_of(), draws_of(SoFlow())
    with term.tapped(network) as tap:
        SoFlow().loss(network, batch, draws, 0, 20)
    assert network.tap is None
    term.loss(tap, batch.x0).backward()
    reached = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight", "x_embedder.proj.weight"} <= reached
    assert not any(name.startswith(("blocks.2", "final_layer")) for name in reached)
    assert all(p.grad is not None and p.grad.any() for p in term.head.parameters())


def test_the_term_is_added_with_its_weight_and_leaves_the_methods_loss() -> None:
    batch, draws = batch_of(), draws_of(SoFlow())
    plain = step_of()(batch, draws)
    steps = {weight: step_of(Alignment(weight, BLOCK, parts, DIM))(batch, draws) for weight in (0.5, 2.0)}
    for weight, record in steps.items():
        aligned = record.terms.pop("alignment_loss")
        assert 0 < aligned < 2
        assert record.loss == pytest.approx(plain.loss + weight * aligned, rel=1e-5)
        assert record.terms == plain.terms


def test_alignment_is_learned() -> None:
    step = step_of(Alignment(1.0, BLOCK, parts, DIM), lr=1e-2)
    batch, draws = batch_of(), draws_of(SoFlow())
    losses = [step(batch, draws).terms["alignment_loss"] for _ in range(15)]
    assert losses[-1] < losses[0] - 0.1


def test_the_head_is_no_part_of_the_network_its_average_or_its_random_numbers() -> None:
    torch.manual_seed(3)
    plain = step_of()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    aligned = step_of(Alignment(1.0, BLOCK, features, DIM))
    assert torch.equal(after, torch.get_rng_state())
    assert same(plain.module.state_dict(), aligned.module.state_dict())
    assert trained(aligned).ema_state().keys() == trained(plain).ema_state().keys()
    assert aligned.names == plain.names


def test_a_training_that_aligns_goes_on_as_if_it_had_not_been_stopped() -> None:
    alignment = Alignment(1.0, BLOCK, parts, DIM)
    whole = trained(trained(step_of(alignment)), first=2)
    begun = trained(step_of(alignment))
    resumed = step_of(alignment, seed=5)
    resumed.load_state_dict(begun.host_state())
    trained(resumed, first=2)
    assert whole.alignment is not None
    assert resumed.alignment is not None
    assert same(whole.module.state_dict(), resumed.module.state_dict())
    assert same(whole.alignment.head.state_dict(), resumed.alignment.head.state_dict())


def test_states_with_and_without_a_head_go_on_in_either_training() -> None:
    alignment = Alignment(1.0, BLOCK, parts, DIM)
    plain, aligned = trained(step_of()), trained(step_of(alignment))
    begins, ends = step_of(alignment), step_of()
    begins.load_state_dict(plain.state_dict())
    ends.load_state_dict(aligned.state_dict())
    assert same(begins.module.state_dict(), plain.module.state_dict())
    assert same(ends.module.state_dict(), aligned.module.state_dict())
    for step in (begins, ends):
        trained(step, first=2)
    other = step_of(Alignment(1.0, BLOCK, lambda x0: features(x0)[:, :3], 3))
    with pytest.raises(ValueError, match=r"4.bias is \(5,\) in the state and \(3,\)"):
        other.load_state_dict(aligned.state_dict())


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_method_passes_each_row_of_a_batch_once_with_gradient_and_in_order(method: str) -> None:
    objective: Objective = OBJECTIVES[method]()
    for policy in (PassPolicy(skip_unused=False), PassPolicy("mixed"), PassPolicy(separate=True)):
        batch, draws = batch_of(), draws_of(objective)
        # Without noise, each noisy row is its clean one times a factor.
        draws = replace(draws, noise=torch.zeros_like(draws.noise))
        passed: list[Tensor] = []
        scale = torch.ones((), requires_grad=True)

        def network(x: Tensor, *_: Any, passed: list[Tensor] = passed, scale: Tensor = scale) -> Tensor:
            if torch.is_grad_enabled():
                passed.append(x.detach())
            return x * scale

        network_policy = policy if objective.teacher_decay is None else replace(policy, teacher=network)
        objective.loss(network, batch, draws, 3, 20, network_policy)
        rows = torch.cat(passed).flatten(1)
        assert len(rows) == len(batch.x0)
        # A row at t = 1 would be noise alone.
        told = rows.norm(dim=1) > 1e-6
        assert told.sum() > len(rows) // 2
        cosine = torch.nn.functional.cosine_similarity(rows[told], batch.x0.flatten(1)[told])
        assert_close(cosine.abs(), torch.ones(len(cosine)), rtol=0, atol=1e-3)
    assert tensors_of(draws)


def test_a_method_that_passes_other_rows_is_refused() -> None:
    network = network_for(SoFlow())
    term = AlignmentTerm(Alignment(1.0, BLOCK, features, DIM), network.config, seed=0)
    batch, draws = batch_of(rows=12), draws_of(SoFlow(), rows=12)
    with term.tapped(network) as tap:
        SoFlow().loss(network, batch, draws, 0, 20)
    with pytest.raises(ValueError, match="passes 12 of 6"):
        term.loss(tap, batch.x0[:6])


@pytest.mark.parametrize("tokens", [1, 6])
def test_parameters_and_flops_of_the_head_are_exact(tokens: int) -> None:
    head = AlignmentHead(16, DIM)
    assert head_parameters(16, DIM) == sum(p.numel() for p in head.parameters())
    with FlopCounterMode(display=False) as counter:
        head(torch.zeros(1, tokens, 16))
    assert head_flops(16, DIM, tokens) == counter.get_total_flops()


def test_what_alignment_does_not_go_with_is_refused() -> None:
    with pytest.raises(ValueError, match="give one above 0, or no alignment"):
        Alignment(0.0, BLOCK, features, DIM)
    with pytest.raises(ValueError, match="there is no block 9; this network has blocks 1 to 2"):
        step_of(Alignment(1.0, 9, features, DIM))
    config = TrainStepConfig(20)
    with pytest.raises(ValueError, match="use FlatAllReduce"):
        TrainStep(
            network_for(SoFlow()), SoFlow(), config, DDP(), alignment=Alignment(1.0, BLOCK, features, DIM)
        )


def test_pieces_of_a_batch_have_the_gradient_of_the_whole() -> None:
    def gradients(pieces: int) -> list[Tensor]:
        step = step_of(Alignment(1.0, BLOCK, parts, DIM), accumulate=pieces)
        generator = torch.Generator().manual_seed(1)
        batch = Batch(torch.randn(12, 2, 4, 4, generator=generator), torch.arange(12) % 3)
        step(batch, draws_of(SoFlow()))
        assert step.alignment is not None
        return [p.grad for p in step.alignment.head.parameters() if p.grad is not None]

    for one, three in zip(gradients(1), gradients(3), strict=True):
        assert_close(one, three, rtol=1e-4, atol=1e-6)
