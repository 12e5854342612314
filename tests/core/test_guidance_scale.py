"""SoFlow and improved MeanFlow trained on a range of guidance scales, which the network takes as a condition."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_core.guidance import Guidance, IntervalGuidance, ScaleRange, draw_scale, sampled_scale
from soflow_core.labels import NULL_LABEL
from soflow_core.networks import DiT
from soflow_core.nfe import training_evaluations
from soflow_core.objectives import Batch, Draws, ImprovedMeanFlow, SoFlow
from soflow_core.passes import PassPolicy
from soflow_core.random_source import GeneratorSource
from soflow_core.settings import from_dict
from soflow_core.times import RatioSchedule
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_core.weights import build_network, load_weights, save_weights
from tests.support.gaussian import Gaussian, column, grid_points, rows_along
from tests.support.random_networks import CONFIG, SHAPE, gradient, random_inputs, random_network

RANGE = SoFlow(guidance=Guidance(scale=ScaleRange(1.0, 4.0), drop=0.3))
IMPROVED = ImprovedMeanFlow(guidance=IntervalGuidance(ScaleRange(1.0, 4.0), start=0.3, end=0.8, drop=0.3))
both = pytest.mark.parametrize("objective", [RANGE, IMPROVED], ids=lambda o: o.method)
CONDITIONED = replace(CONFIG, guidance_scale=True)


def conditioned_network(dtype: torch.dtype = torch.float64) -> DiT:
    network = DiT(CONDITIONED).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.copy_(0.25 * torch.randn(p.shape, generator=generator, dtype=dtype))
    return network


def inputs(
    objective: SoFlow | ImprovedMeanFlow = RANGE, dtype: torch.dtype = torch.float64
) -> tuple[Batch, Draws]:
    """12 rows with the times and noise of `random_inputs`, and scales."""
    batch, draws = random_inputs(objective, 12, dtype)
    assert draws.dropped is not None
    source = GeneratorSource(torch.Generator().manual_seed(3), len(draws.t))
    scale = draw_scale(objective.guidance.scale, source, draws.dropped)
    assert scale is not None
    return batch, replace(draws, scale=scale.to(dtype))


@both
def test_scales_are_log_uniform_and_one_where_the_label_is_dropped(
    objective: SoFlow | ImprovedMeanFlow,
) -> None:
    draws = objective.draw(torch.Generator().manual_seed(0), 20_000, (1, 1, 1), conditional=True)
    assert draws.scale is not None
    assert (draws.scale[draws.dropped] == 1).all()
    share = (draws.scale[~draws.dropped].log() / torch.log(torch.tensor(4.0))).sort().values
    assert (share - torch.linspace(0, 1, len(share))).abs().max() < 0.02
    assert objective.draw(None, 8, (1, 1, 1), conditional=False).scale is None


@both
def test_a_range_leaves_the_other_draws_as_they_are(objective: SoFlow | ImprovedMeanFlow) -> None:
    one = replace(objective, guidance=replace(objective.guidance, scale=3.0))
    alone, ranged = (o.draw(torch.Generator().manual_seed(0), 64, SHAPE, True) for o in (one, objective))
    assert alone.scale is None
    for name in ("noise", "t", "s", "dropped"):
        assert torch.equal(getattr(alone, name), getattr(ranged, name))


@both
@pytest.mark.parametrize("skip_unused", [True, False], ids=["skipping", "whole"])
@pytest.mark.parametrize("scale", [1.0, 2.5, 4.0])
def test_rows_of_one_scale_have_the_loss_of_that_scale_alone(
    objective: SoFlow | ImprovedMeanFlow, scale: float, skip_unused: bool
) -> None:
    """Labelled rows are asked at their scale, the others at 1."""
    network, (batch, draws) = conditioned_network(), inputs(objective)
    draws = replace(draws, scale=torch.where(draws.dropped, 1.0, scale).double())

    def at_scale(x: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        return network(x, t, s, labels, torch.where(labels == NULL_LABEL, 1.0, scale).double())

    # A scale of 1 turns guidance off where it is the only one.
    alone = replace(objective, guidance=replace(objective.guidance, scale=max(scale, 1 + 1e-12)))
    policy = PassPolicy(skip_unused=skip_unused)
    found = objective.loss(network, batch, draws, 3, 10, policy).loss
    expected = alone.loss(at_scale, batch, replace(draws, scale=None), 3, 10, policy).loss
    assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert_close(gradient(found, network), gradient(expected, network), rtol=1e-8, atol=1e-10)


@both
def test_the_loss_of_rows_of_unlike_scales_is_the_mean_of_each_row_alone(
    objective: SoFlow | ImprovedMeanFlow,
) -> None:
    network, (batch, draws) = conditioned_network(), inputs(objective)
    whole = objective.loss(network, batch, draws, 3, 10).loss
    rows = [
        objective.loss(
            network, batch.rows(i, 12), draws.rows(i, 12), 3, 10, PassPolicy(skip_unused=False)
        ).loss
        for i in range(12)
    ]
    assert_close(torch.stack(rows).mean(), whole)


@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_training_on_a_range_settles_on_the_guided_flow_of_each_scale(mix: float) -> None:
    """f = (S^c_s / S^c_t)^w (S^u_s / S^u_t)^(1 - w) x for zero means, at the scale w of each row."""
    conditional, unconditional = Gaussian(0.0, 0.3), Gaussian(0.0, 0.9)
    x, t, s = grid_points()
    scales = torch.tensor([1.0, 1.7, 3.0, 4.0], dtype=torch.float64).repeat(len(t) // 4)

    def network(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, scale: Tensor) -> Tensor:
        same, w = column(t) == column(s), column(scale)
        c = conditional.spread(column(s)) / conditional.spread(column(t))
        u = unconditional.spread(column(s)) / unconditional.spread(column(t))
        gap = torch.where(same, torch.ones_like(column(t)), column(t - s))
        velocity = w * conditional.velocity(x, t) + (1 - w) * unconditional.velocity(x, t)
        average = torch.where(same, velocity, (x - c**w * u ** (1 - w) * x) / gap)
        assert labels is not None
        null = column(labels) == NULL_LABEL
        assert (scale[labels == NULL_LABEL] == 1).all()
        return torch.where(null, unconditional.network(x, t, s, None), average)

    guidance = Guidance(ScaleRange(1.0, 4.0), mix, 0.1, decay_from=1.0)
    schedule = RatioSchedule("constant", 0.001, 0.001)
    objective = SoFlow(schedule=schedule, weight_power=0.0, guidance=guidance)
    batch, draws = rows_along(x, t, s, conditional.velocity(x, t))
    batch = Batch(batch.x0, torch.zeros(len(t), dtype=torch.int64))
    pair = replace(draws, dropped=torch.zeros(len(t), dtype=torch.bool), scale=scales)
    assert objective.loss(network, batch, pair, 0, 1).terms["consistency_mse"] < 1e-5
    single = replace(pair, s=t, velocity_rows=len(t))
    assert objective.loss(network, batch, single, 0, 1).terms["velocity_mse"] < 1e-25
    improved = ImprovedMeanFlow(guidance=IntervalGuidance(ScaleRange(1.0, 4.0)))
    assert improved.loss(network, batch, pair, 0, 1).terms["average_mse"] < 1e-18
    assert improved.loss(network, batch, single, 0, 1).terms["velocity_mse"] < 1e-25

    def of_other_scales(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, scale: Tensor) -> Tensor:
        return network(x, t, s, labels, torch.where(labels == NULL_LABEL, 1.0, 5 - scale))

    assert objective.loss(of_other_scales, batch, pair, 0, 1).terms["consistency_mse"] > 1e-2
    assert improved.loss(of_other_scales, batch, pair, 0, 1).terms["average_mse"] > 1e-2


def test_branches_of_unlike_precision_get_the_scales_of_their_rows() -> None:
    batch, draws = inputs(dtype=torch.float32)
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor, _s: Tensor, _labels: Tensor | None, scale: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append((t, scale))
        return (0 * x).requires_grad_()

    RANGE.loss(network, batch, draws, 3, 10, PassPolicy("mixed"))
    assert len(seen) == 2
    assert torch.equal(torch.cat([t for t, _ in seen]), draws.t)
    assert torch.equal(torch.cat([scale for _, scale in seen]), draws.scale)


def test_samples_are_those_of_the_chosen_scale() -> None:
    network, labels = conditioned_network(), torch.tensor([0, 1, 2])
    noise, again = torch.randn(2, 3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    samples = {
        scale: replace(RANGE, sampling_scale=scale).sample(network, noise, labels, 2, [again])
        for scale in (None, 1.0, 2.0, 4.0)
    }
    assert torch.equal(samples[None], samples[2.0])
    assert not torch.allclose(samples[1.0], samples[4.0])
    times = torch.tensor([1.0, 0.5], dtype=torch.float64)[:, None].expand(2, 3)
    w = torch.full((3,), 4.0, dtype=torch.float64)
    x0 = noise - network(noise, times[0], 0 * times[0], labels, w)
    x = 0.5 * x0 + 0.5 * again
    assert_close(samples[4.0], x - 0.5 * network(x, times[1], 0 * times[1], labels, w))
    step = noise - 0.5 * network(noise, times[0], times[1], labels, w)
    found = replace(IMPROVED, sampling_scale=4.0).sample(network, noise, labels, 2)
    assert_close(found, step - 0.5 * network(step, times[1], 0 * times[1], labels, w))


def test_the_scale_of_a_range_is_its_geometric_mean_where_none_is_chosen() -> None:
    assert sampled_scale(ScaleRange(2.0, 8.0), None) == 4.0
    assert sampled_scale(3.0, None) == sampled_scale(3.0, 3.0) == 3.0
    for objective in (RANGE, IMPROVED):
        assert [replace(objective, sampling_scale=w).trained_guidance for w in (None, 3.5)] == [2.0, 3.5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": {"scale": {"low": 0.5, "high": 2.0}}}, "give 1 <= low < high"),
        ({"guidance": {"scale": {"low": 2.0, "high": 2.0}}}, "give 1 <= low < high"),
        (
            {"guidance": {"scale": {"low": 1.0, "high": 2.0}}, "sampling_scale": 3.0},
            "trained on scales from 1.0",
        ),
        ({"sampling_scale": 2.0}, "a range there"),
    ],
)
def test_impossible_scales_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(SoFlow, settings)


def test_a_network_without_the_condition_keeps_its_parameters() -> None:
    torch.manual_seed(0)
    plain = DiT(CONFIG).state_dict()
    names = set(DiT(CONDITIONED).state_dict()) - set(plain)
    assert names == {f"w_embedder.mlp.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    assert not any(name.startswith("w_embedder") for name in plain)


def test_the_condition_starts_at_nothing_and_no_scale_is_a_scale_of_one() -> None:
    t, s, labels = torch.rand(4), torch.zeros(4), torch.arange(4) % 3
    fresh = DiT(CONDITIONED)
    assert torch.equal(
        fresh.condition(t, s, labels, torch.full((4,), 3.0)), fresh.condition(t, s, labels, None)
    )
    network = conditioned_network(torch.float32)
    at_one = network.condition(t, s, labels, torch.ones(4))
    assert torch.equal(network.condition(t, s, labels, None), at_one)
    assert not torch.allclose(network.condition(t, s, labels, torch.full((4,), 3.0)), at_one)


def test_networks_and_objectives_that_do_not_fit_are_refused() -> None:
    config = TrainStepConfig(1)
    with pytest.raises(ValueError, match="needs a network with guidance_scale=True"):
        TrainStep(random_network(torch.float32), RANGE, config)
    with pytest.raises(ValueError, match="needs a network with guidance_scale=False"):
        TrainStep(conditioned_network(torch.float32), SoFlow(), config)
    x, t = torch.zeros(2, *SHAPE, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="takes no guidance scale"):
        random_network()(x, t, t, torch.tensor([0, 1]), t)
    with pytest.raises(ValueError, match="guidance_scale needs classes"):
        replace(CONDITIONED, classes=None, null_label=False)


@both
def test_a_step_trains_the_condition_and_its_weights_come_back(
    objective: SoFlow | ImprovedMeanFlow, tmp_path: Path
) -> None:
    train = TrainStep(conditioned_network(torch.float32), objective, TrainStepConfig(2, precision="float32"))
    assert train(*inputs(objective, torch.float32)).finite
    gradient_of = {name: p.grad for name, p in train.module.named_parameters()}
    assert gradient_of["w_embedder.mlp.0.weight"].abs().max() > 0
    path = tmp_path / "weights.safetensors"
    save_weights(path, train.module.state_dict(), CONDITIONED, objective, {})
    weights = load_weights(path)
    assert (weights.network_config, weights.objective) == (CONDITIONED, objective)
    assert build_network(weights).w_embedder is not None


def test_a_range_costs_what_one_scale_costs() -> None:
    assert training_evaluations(RANGE, 128) == training_evaluations(SoFlow(), 128) == 4.5
    alone = ImprovedMeanFlow(guidance=IntervalGuidance(3.0))
    assert training_evaluations(IMPROVED, 128) == training_evaluations(alone, 128) == 5.5
