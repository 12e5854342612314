"""The U-Net: exact small cases, its cost, dropout, and the names of official checkpoints."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import silu
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from soflow_core.conformance.test_network import filled
from soflow_core.dropout import dropout, step_seed
from soflow_core.networks import NULL_LABEL, UNet, UNetConfig
from soflow_core.networks.unet_layers import HALVED, Positional, Resample, UNetBlock
from soflow_core.objectives import Batch, SoFlow
from soflow_core.optimizer import OptimizerConfig
from soflow_core.published import read_published
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_core.weights import WeightsError, build_network

CIFAR = UNetConfig(3, 32, 32, dropout=0.3, augmentations=6)


def small(**given: Any) -> UNetConfig:
    return UNetConfig.example(**{"channels": 3, "height": 8, "width": 8, **given})


def test_the_network_of_cifar_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = CIFAR.build()
    assert sum(p.numel() for p in network.parameters()) == CIFAR.parameters()
    assert CIFAR.parameters() == pytest.approx(55.93e6, abs=5e3)
    shapes = {name: tuple(p.shape) for name, p in network.state_dict().items()}
    # Names and shapes of EDM's SongUNet with a filter of four taps and two embeddings of 256.
    assert shapes["map_layer0.weight"] == (512, 512)
    assert shapes["map_augment.weight"] == (512, 6)
    assert shapes["enc.32x32_conv.weight"] == (128, 3, 3, 3)
    assert shapes["enc.16x16_down.conv0.resample_filter"] == (1, 1, 4, 4)
    assert shapes["enc.16x16_block3.qkv.weight"] == (768, 256, 1, 1)
    assert shapes["dec.8x8_in0.proj.bias"] == (256,)
    assert shapes["dec.32x32_block4.skip.weight"] == (256, 384, 1, 1)
    assert shapes["dec.32x32_aux_conv.weight"] == (3, 256, 3, 3)
    attention = {name.rpartition(".qkv")[0] for name in shapes if ".qkv.weight" in name}
    assert attention == {f"enc.16x16_block{i}" for i in range(4)} | {"dec.8x8_in0", "dec.16x16_block4"}


@pytest.mark.parametrize(
    "config",
    [
        small(classes=3, null_label=True),
        small(width=16, multipliers=(1, 2, 2), attention=(8, 4), resample=(1, 1), augmentations=2),
    ],
)
def test_parameters_and_flops_are_those_of_the_network(config: UNetConfig) -> None:
    network = config.build()
    assert config.parameters() == sum(p.numel() for p in network.parameters())
    label = None if config.classes is None else torch.zeros(1, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *config.sample_shape), torch.ones(1), torch.zeros(1), label)
    assert config.forward_flops() == counter.get_total_flops()


@torch.no_grad()
def test_a_new_network_is_almost_zero() -> None:
    output = small().build()(torch.randn(2, 3, 8, 8), torch.ones(2), torch.zeros(2))
    assert 0 < output.abs().max() < 1e-3


def one_tap(direction: str, taps: tuple[int, ...]) -> Resample:
    layer = Resample(1, 1, 1, direction, taps)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    return layer


@torch.no_grad()
def test_resampling_is_centred_and_keeps_constants() -> None:
    ramp = torch.arange(8.0)[None, None, None].expand(1, 1, 8, 8)
    for taps in ((1, 1), (1, 3, 3, 1)):
        # The middle of each pair of pixels, and the two places at a quarter on both sides of a pixel's middle.
        halved = one_tap("down", taps)(ramp)[0, 0, 2, 1:-1]
        assert_close(halved, torch.tensor([2.5, 4.5]))
        doubled = one_tap("up", taps)(ramp)[0, 0, 6]
        assert doubled.shape == (16,)
        shift = 0.0 if len(taps) == 2 else 0.25
        assert_close(doubled[6:8], torch.tensor([3 - shift, 3 + shift]))
        assert_close(one_tap("up", taps)(torch.ones(1, 1, 6, 6))[0, 0, 2:-2, 2:-2], torch.ones(8, 8))


def test_times_are_embedded_at_frequencies_up_to_both_ends() -> None:
    embedded = Positional(6)(torch.tensor([0.5]))
    angles = [0.5, 0.5e-2, 0.5e-4]
    expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    assert_close(embedded, torch.tensor([expected]))


def test_t_and_its_distance_from_s_are_embedded_beside_each_other() -> None:
    network = filled(small().build(), seed=0)
    assert isinstance(network, UNet)
    t, s = torch.tensor([0.7]), torch.tensor([0.2])
    times = torch.cat([Positional(16)(t), Positional(16)(t - s)], dim=1)
    linear = network.map_layer0, network.map_layer1
    expected = silu(linear[1](silu(linear[0](times))))
    assert_close(network.condition(t, s, None), expected)


@torch.no_grad()
def test_a_block_of_one_pixel_is_what_its_formula_says() -> None:
    """One channel group of four equal channels: a norm gives the bias alone, and convolutions their middle tap."""
    block = UNetBlock(4, 4, 1, attention=True)
    for parameter in block.parameters():
        parameter.fill_(0.0)
    block.norm0.bias.fill_(2.0)
    block.conv0.weight[:, :, 1, 1] = 0.5 * torch.eye(4)
    block.affine.bias.fill_(7.0)
    block.norm1.bias.fill_(-1.0)
    block.conv1.weight[:, :, 1, 1] = 3 * torch.eye(4)
    assert block.norm2 is not None
    assert block.qkv is not None
    assert block.proj is not None
    block.norm2.bias.fill_(0.25)
    # Rows of a channel are query, key and value; of a single place attention is its value.
    block.qkv.weight[2::3, :, 0, 0] = torch.eye(4)
    block.proj.weight[:, :, 0, 0] = 2 * torch.eye(4)
    x = torch.full((1, 4, 1, 1), 5.0)
    inner = (5 + 3 * silu(torch.tensor(-1.0))) * HALVED
    assert_close(block(x, torch.zeros(1, 1)), ((2 * 0.25 + inner) * HALVED).expand(1, 4, 1, 1))


@torch.no_grad()
def test_a_dropped_label_is_a_vector_of_zeros() -> None:
    network = filled(small(classes=4, null_label=True).build(), seed=0)
    assert isinstance(network, UNet)
    t, s = torch.ones(3), torch.zeros(3)
    labels = torch.tensor([2, NULL_LABEL, 4])
    vectors = network._label_vectors(labels, t)
    assert torch.equal(vectors, 2.0 * torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert torch.equal(network.condition(t, s, None)[1], network.condition(t, s, labels)[1])
    with pytest.raises(ValueError, match="no null label"):
        small(classes=4).build()(torch.zeros(3, 3, 8, 8), t, s)


def dropping(share: float = 0.5) -> UNet:
    network = filled(small(dropout=share).build(), seed=0).train()
    assert isinstance(network, UNet)
    return network


@torch.no_grad()
def test_dropout_has_one_mask_in_a_step_and_none_outside() -> None:
    network = dropping()
    inputs = torch.randn(2, 3, 8, 8), torch.ones(2), torch.zeros(2)
    plain, before = network(*inputs), torch.get_rng_state()
    with dropout(network, 0, 7, 1):
        first, again = network(*inputs), network(*inputs)
        assert torch.equal(network.eval()(*inputs), plain)
        network.train()
    with dropout(network, 0, 8, 1):
        other = network(*inputs)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, plain)
    assert torch.equal(network(*inputs), plain)
    assert torch.equal(before, torch.get_rng_state())
    assert len({step_seed("dropout", 0, step, piece) for step in range(50) for piece in range(4)}) == 200


@torch.no_grad()
def test_masks_keep_a_share_and_the_mean() -> None:
    network = dropping(0.3)
    network.dropout_seed = 5
    masks = [mask for mask in network._masks(torch.zeros(64, 3, 8, 8)) if mask is not None]
    assert [tuple(mask.shape[1:]) for mask in masks][:2] == [(8, 8, 8), (8, 4, 4)]
    values = torch.cat([mask.flatten() for mask in masks])
    assert values.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert float((values == 0).float().mean()) == pytest.approx(0.3, abs=0.005)


def rows_of_masks(objective: SoFlow) -> list[tuple[int, bool, int | None]]:
    """(rows, whether with gradient, seed of the masks) of each pass of a training step."""
    network, calls = dropping(), []
    network.register_forward_pre_hook(
        lambda module, given: calls.append((len(given[0]), torch.is_grad_enabled(), module.dropout_seed))
    )
    config = TrainStepConfig(10, OptimizerConfig(lr=1e-3), precision="float32")
    step = TrainStep(network, objective, config)
    draws = objective.draw(torch.Generator().manual_seed(0), 8, (3, 8, 8), False)
    assert step(Batch(torch.randn(8, 3, 8, 8)), draws).finite
    assert network.dropout_seed is None
    return calls


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_both_sides_of_the_consistency_loss_are_passes_of_the_same_rows(share: float) -> None:
    calls = rows_of_masks(SoFlow(flow_matching_share=share))
    consistency = [rows for rows, _, _ in calls][-2:]
    assert consistency == [8 - int(8 * share)] * 2
    assert [gradient for _, gradient, _ in calls][-2:] == [True, False]
    assert len({seed for _, _, seed in calls} - {None}) == 1


@pytest.mark.parametrize("prefix", ["network.", "module.network.", ""])
def test_official_checkpoints_are_read_by_their_names(tmp_path: Path, prefix: str) -> None:
    config = UNetConfig(3, 16, 16, base=32, multipliers=(1, 2, 2), blocks=2, attention=(8,), augmentations=6)
    network = filled(config.build(), seed=0)
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save({"ema_model": state, "steps": 3} if prefix else state, tmp_path / "official.pt")
    weights = read_published(tmp_path / "official.pt")
    assert weights.network_config == config
    assert isinstance(weights.objective, SoFlow)
    assert not weights.objective.guidance.active
    x, t, s = torch.randn(2, 3, 16, 16), torch.tensor([0.9, 0.5]), torch.tensor([0.1, 0.5])
    with torch.no_grad():
        assert torch.equal(build_network(weights)(x, t, s), network.eval()(x, t, s))


def test_checkpoints_of_other_networks_are_refused(tmp_path: Path) -> None:
    network = small(time_width=4).build()
    state: dict[str, Tensor] = network.state_dict()
    torch.save({"ema_model": state}, tmp_path / "one-time.pt")
    with pytest.raises(WeightsError, match="one time"):
        read_published(tmp_path / "one-time.pt")
    state, name = small().build().state_dict(), "enc.4x4_down.skip.resample_filter"
    torch.save({"ema_model": {**state, name: state[name] * 2}}, tmp_path / "filters.pt")
    with pytest.raises(WeightsError, match="different filters"):
        read_published(tmp_path / "filters.pt")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 9}, "9 x 8 cannot be halved 1 times"),
        ({"base": 130, "channels": 3}, "do not divide into 32 groups"),
        ({"multipliers": ()}, "give 1 to 10 whole numbers"),
        ({"resample": (1, 2, 1)}, "an even number of taps"),
        ({"time_width": 3}, "an even number from 4 up"),
        ({"dropout": 1.0}, "a share from 0 to below 1"),
        ({"classes": 3, "guidance_scale": True}, "does not take the guidance scale"),
    ],
)
def test_impossible_architectures_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**given)


def test_the_small_network_keeps_inputs_and_conditions() -> None:
    tiny = replace(CIFAR, classes=10, null_label=True).small()
    assert (tiny.channels, tiny.classes, tiny.null_label, tiny.dropout) == (3, 10, True, 0.3)
    assert tiny.parameters() < 100_000


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_pieces_of_one_row_have_one_branch_alone(share: float) -> None:
    objective = SoFlow(flow_matching_share=share)
    config = TrainStepConfig(10, OptimizerConfig(lr=1e-3), precision="float32", accumulate=4)
    step = TrainStep(dropping(), objective, config)
    draws = objective.draw(torch.Generator().manual_seed(0), 4, (3, 8, 8), False)
    assert step(Batch(torch.randn(4, 3, 8, 8)), draws).finite


@torch.no_grad()
def test_a_pass_of_no_rows_is_made_as_a_sharded_network_needs_it() -> None:
    network = small(classes=3, null_label=True, augmentations=6, dropout=0.5).build().train()
    network.augmentation, network.dropout_seed = torch.zeros(4, 6), 1
    inputs = torch.zeros(0, 3, 8, 8), torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert network(*inputs).shape == (0, 3, 8, 8)
