"""The settings of a DiT that depart from the paper's network: cost, conformance, and what each of them does."""

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

from soflow_core.conformance import test_network as conformance
from soflow_core.networks import DiT, DiTConfig, dit_config
from soflow_core.networks.dit import PARITY
from soflow_core.networks.layers import Attention, GatedMlp, RMSNorm
from soflow_core.networks.positions import rotary_positions, rotate
from soflow_core.passes import Passes, PassPolicy
from soflow_core.settings import from_dict, to_dict
from soflow_core.sharding import shard

EACH: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "rope": {"rope": True},
    "swiglu": {"swiglu": True},
    "registers": {"registers": 3},
    "condition_tokens": {"condition_tokens": 2},
    "all": {"qk_norm": True, "rope": True, "swiglu": True, "registers": 3, "condition_tokens": 2},
}
GIVEN = {"channels": 2, "height": 8, "width": 8, "classes": 3, "null_label": True}


def config_with(**options: Any) -> DiTConfig:
    return DiTConfig.example(**{**GIVEN, "hidden": 16, "heads": 2, **options})


@pytest.fixture(params=EACH)
def config(request: pytest.FixtureRequest) -> DiTConfig:
    return config_with(**EACH[request.param])


@pytest.fixture
def network(config: DiTConfig) -> DiT:
    network = conformance.filled(config.build(), seed=0)
    assert isinstance(network, DiT)
    return network


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", EACH)
@pytest.mark.parametrize(
    "given",
    [
        {"classes": 3, "guidance_scale": True, "second_time": "time"},
        {"classes": None, "null_label": False, "second_time": "none", "mlp_ratio": 2.7},
    ],
    ids=["labels", "no labels"],
)
def test_parameters_and_flops_are_those_of_the_network(options: str, given: dict[str, Any]) -> None:
    config = config_with(**EACH[options], **given)
    network, c = config.build(), config
    assert config.parameters() == sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert config.trained_parameters() == trained
    time = torch.full((1,), 0.5)
    labels = None if c.classes is None else torch.zeros(1, dtype=torch.int64)
    # In operations that torch counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 2, 8, 8), time, time, labels)
    assert config.forward_flops() == counter.get_total_flops()


def test_it_conforms_as_a_network(config: DiTConfig, network: DiT, one_rank: None) -> None:
    del one_rank
    conformance.test_settings_survive_a_header(config)
    conformance.test_weights_are_drawn_from_torchs_generator(config)
    conformance.test_rows_are_independent_and_nothing_is_drawn(network)
    conformance.test_every_input_matters(network)
    conformance.test_gradients_reach_every_trained_parameter(network)
    conformance.test_reduced_precision_stays_near(network)
    x, t, s, labels = conformance.inputs(torch.float64)
    passes, velocity = Passes(network.double(), PassPolicy()), torch.randn_like(x)
    exact = passes.total_derivative(x, t * 0.9, s * 0.5, labels, velocity)
    quotient = passes.total_derivative(x, t * 0.9, s * 0.5, labels, velocity, difference=1e-4)
    assert_close(quotient, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    network.float()
    plain = network(*conformance.inputs()).detach()
    assert_close(shard(network)(*conformance.inputs()).detach(), plain, rtol=1e-4, atol=1e-5)


def test_a_new_network_is_zero_everywhere_and_learns_everywhere(config: DiTConfig) -> None:
    network = config.build()
    assert not network(*conformance.inputs()).any()
    small = config.small()
    assert isinstance(small, DiTConfig)
    assert bool(small.registers) == bool(config.registers)
    assert small.build()


@pytest.mark.slow
def test_compiled_it_has_the_outputs_of_an_eager_one() -> None:
    network = conformance.filled(config_with(**EACH["all"]).build(), seed=0)
    conformance.test_compiled_it_has_the_outputs_of_an_eager_one(network)


def test_the_default_is_the_papers_network() -> None:
    config = dit_config("S/4", 1, 8, 8, classes=10)
    assert {name: getattr(config, name) for name in PARITY} == PARITY
    plain = to_dict(config)
    before = {name: value for name, value in plain.items() if name not in PARITY}
    assert from_dict(DiTConfig, before) == config, "a header from before these settings means the default"
    names = set(config.build().state_dict())
    for options in EACH.values():
        assert set(replace(config, **options).build().state_dict()) != names or options.get("swiglu")


def test_rotated_products_depend_on_the_distance_of_patches_alone() -> None:
    rows, columns, before = 5, 4, 2
    table = rotary_positions(8, rows, columns, before)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).double()
    everywhere = torch.ones(1, 1, before + rows * columns, 8, dtype=torch.float64)
    products = rotate(query * everywhere, table)[0, 0] @ rotate(key * everywhere, table)[0, 0].T
    places = products[before:, before:].reshape(rows, columns, rows, columns)
    assert_close(places[1:, 1:, 1:, 1:], places[:-1, :-1, :-1, :-1], rtol=0, atol=1e-6)
    assert not torch.allclose(places[0, 0, 0, 1], places[0, 0, 1, 0])
    assert_close(products[:before, :before], torch.full((2, 2), float((query * key).sum())).double())


def test_patches_are_told_apart_by_rotation_without_the_table() -> None:
    """Two images whose only difference is where a patch is have the same output but for the place, unless positions enter."""

    def swapped(**options: Any) -> Tensor:
        network = conformance.filled(config_with(**options).build(), seed=0)
        assert isinstance(network, DiT)
        network.pos_embed.data.zero_()
        x = torch.zeros(1, 2, 8, 8)
        x[:, :, :2, :2] = 1
        other = torch.zeros(1, 2, 8, 8)
        other[:, :, 2:4, 4:6] = 1
        other[:, :, :2, :2] = 0
        time = torch.full((1,), 0.5)
        label = torch.zeros(1, dtype=torch.int64)
        return network(x, time, time, label)[..., :2, :2] - network(other, time, time, label)[..., 2:4, 4:6]

    assert_close(swapped(), torch.zeros(1, 2, 2, 2), rtol=0, atol=1e-5)
    assert swapped(rope=True).abs().max() > 1e-2


def test_normed_queries_and_keys_forget_their_length() -> None:
    attention = Attention(16, 2, qk_norm=True)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    before = attention(x)
    with torch.no_grad():
        attention.qkv.weight[:32] *= 7
        attention.qkv.bias[:32] *= 7
    assert_close(attention(x), before, rtol=1e-4, atol=1e-5)
    norm = RMSNorm(4, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 1.0, 1.0]))
    assert_close(norm(torch.tensor([3.0, 1.0, -1.0, 5.0])), torch.tensor([3.0, 2.0, -1.0, 5.0]) / 3)


def test_a_gated_mlp_multiplies_by_the_silu_of_its_gate() -> None:
    mlp = GatedMlp(1, 1)
    values = {"fc1_g": (2.0, 1.0), "fc1_x": (3.0, -1.0), "fc2": (0.5, 0.25)}
    with torch.no_grad():
        for name, (weight, bias) in values.items():
            layer = getattr(mlp, name)
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
    gate = torch.tensor(2.0 * 0.5 + 1)
    expected = 0.5 * (gate * torch.sigmoid(gate)) * (3.0 * 0.5 - 1) + 0.25
    assert_close(mlp(torch.tensor([[[0.5]]])).squeeze(), expected)


@pytest.mark.parametrize("size", ["S/2", "B/2", "XL/2"])
def test_a_gated_mlp_has_about_as_many_parameters(size: str) -> None:
    plain = dit_config(size, 4, 32, 32)
    gated = replace(plain, swiglu=True)
    assert gated.mlp_width % 8 == 0
    assert gated.parameters() == pytest.approx(plain.parameters(), rel=0.002)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope": True, "heads": 8}, "rope turns channels of a head in fours, and 16 over 8 heads is 2"),
        ({"registers": -1}, "registers is -1; it must be from 0"),
        ({"condition_tokens": 2**20}, "condition_tokens is 1048576"),
        ({"qk_norm": 1}, "qk_norm is 1; true or false is needed"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_with(**options)
