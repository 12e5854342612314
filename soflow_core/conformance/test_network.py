"""The contract of a network, for every registered one or those of `--network`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from soflow_core.conformance.test_objective import filled
from soflow_core.networks import NETWORKS, NULL_LABEL, Architecture, NetworkModule
from soflow_core.objectives import OBJECTIVES
from soflow_core.passes import Passes, PassPolicy
from soflow_core.settings import to_dict
from soflow_core.sharding import shard
from soflow_core.weights import build_network, load_weights, save_weights

SHAPE, CLASSES, ROWS = (2, 8, 8), 3, 6
FLOPS_TOLERANCE = 0.15
"""Share by which FLOPs may differ from torch's count, which leaves out some products and all additions."""


@pytest.fixture
def architecture(network_class: type[Architecture]) -> Architecture:
    return example(network_class)


@pytest.fixture
def network(architecture: Architecture) -> NetworkModule:
    return filled(architecture.build(), seed=0)


def example(network_class: type[Architecture], **settings: Any) -> Architecture:
    given = {
        "channels": SHAPE[0],
        "height": SHAPE[1],
        "width": SHAPE[2],
        "classes": CLASSES,
        "null_label": True,
    }
    return network_class.example(**{**given, **settings})


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, s and labels, one of them dropped."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, *SHAPE, generator=generator, dtype=dtype)
    t = torch.linspace(0.3, 1, ROWS, dtype=dtype)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    labels[0] = NULL_LABEL
    return x, t, t * torch.linspace(0, 1, ROWS, dtype=dtype), labels


def test_settings_survive_a_header(architecture: Architecture) -> None:
    assert NETWORKS.read(json.loads(json.dumps(to_dict(architecture)))) == architecture
    assert architecture.title


def test_cost_is_known_before_it_is_built(architecture: Architecture) -> None:
    network = architecture.build()
    assert architecture.parameters() == sum(p.numel() for p in network.parameters())
    assert architecture.least_tensors <= len(network.state_dict())
    x, t, s, labels = (each[:1] for each in inputs())
    with FlopCounterMode(display=False) as counter:
        network(x, t, s, labels)
    assert architecture.forward_flops() == pytest.approx(counter.get_total_flops(), rel=FLOPS_TOLERANCE)


def test_weights_are_drawn_from_torchs_generator(architecture: Architecture) -> None:
    networks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        networks.append(architecture.build())
    states = [torch.cat([p.flatten() for p in network.parameters()]) for network in networks]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert networks[0].config == architecture


@torch.no_grad()
def test_rows_are_independent_and_nothing_is_drawn(network: NetworkModule) -> None:
    arguments, before = inputs(), torch.get_rng_state()
    output = network(*arguments)
    assert output.shape == arguments[0].shape
    assert output.dtype == torch.float32
    assert output.isfinite().all()
    assert torch.equal(network.train()(*arguments), network.eval()(*arguments)), (
        "training and evaluation differ"
    )
    assert_close(network(*(each[2:4] for each in arguments)), output[2:4], rtol=1e-4, atol=1e-5)
    assert torch.equal(before, torch.get_rng_state())


@torch.no_grad()
def test_every_input_matters(network: NetworkModule) -> None:
    x, t, s, labels = inputs()
    output = network(x, t, s, labels)
    others = (
        (x + 0.1, t, s, labels),
        (x, t * 0.9, s, labels),
        (x, t, s * 0.5, labels),
        (x, t, s, labels.roll(1)),
    )
    for other in others:
        assert not torch.allclose(network(*other), output)
    dropped = torch.full_like(labels, NULL_LABEL)
    assert torch.equal(network(x, t, s, None), network(x, t, s, dropped)), "None labels are the null label"


def test_another_shape_is_refused(network: NetworkModule) -> None:
    x, t, s, labels = inputs()
    with pytest.raises(ValueError, match="shape"):
        network(x[..., :4], t, s, labels)


def test_gradients_reach_every_trained_parameter(network: NetworkModule) -> None:
    network(*inputs()).square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_it_builds_without_classes(network_class: type[Architecture]) -> None:
    network = filled(example(network_class, classes=None, null_label=False).build(), seed=0)
    x, t, s, _ = inputs()
    assert network(x, t, s, None).isfinite().all()


def test_the_guidance_scale_is_taken_or_refused_in_its_settings(network_class: type[Architecture]) -> None:
    try:
        architecture = example(network_class, guidance_scale=True)
    except ValueError:
        pytest.skip("it refuses the guidance scale as a condition")
    network = filled(architecture.build(), seed=0)
    scale = torch.full((ROWS,), 3.0)
    assert torch.allclose(network(*inputs()), network(*inputs(), torch.ones(ROWS)), atol=1e-6)
    assert not torch.allclose(network(*inputs()), network(*inputs(), scale))


def test_it_has_a_forward_mode_derivative(network: NetworkModule) -> None:
    """The derivative along the path that MeanFlow takes is that of a difference quotient, in float64."""
    x, t, s, labels = inputs(torch.float64)
    t = t * 0.9
    passes, velocity = Passes(network.double(), PassPolicy()), torch.randn_like(x)
    exact = passes.total_derivative(x, t, s * 0.5, labels, velocity)
    quotient = passes.total_derivative(x, t, s * 0.5, labels, velocity, difference=1e-4)
    assert_close(quotient, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@torch.no_grad()
def test_reduced_precision_stays_near(network: NetworkModule) -> None:
    arguments = inputs()
    full = network(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = network(*arguments).float()
    assert (reduced - full).norm() < 0.05 * full.norm()


@torch.no_grad()
def test_weights_come_back_from_a_file(network: NetworkModule, tmp_path: Path) -> None:
    """Everything that decides an output is in the state: a network is built without memory before weights are put in."""
    save_weights(
        tmp_path / "w.safetensors", network.state_dict(), network.config, OBJECTIVES["flow_matching"](), {}
    )
    again = build_network(load_weights(tmp_path / "w.safetensors"))
    assert torch.equal(again(*inputs()), network.eval()(*inputs()))


def test_repeated_blocks_are_parts_beside_each_other(network: NetworkModule) -> None:
    modules = {id(module) for module in network.modules()} - {id(network)}
    blocks = list(network.repeated_blocks)
    inside = [id(module) for block in blocks for module in block.modules()]
    assert set(inside) <= modules
    assert len(set(inside)) == len(inside), "a block is part of another"


def test_the_small_network_has_the_same_conditions(network_class: type[Architecture]) -> None:
    small = example(network_class).small()
    assert (small.channels, small.classes, small.null_label) == (SHAPE[0], CLASSES, True)
    assert small.parameters() < 1_000_000
    assert replace(small, classes=None, null_label=False).build()


def test_one_rank_that_shards_it_has_the_outputs_of_a_plain_one(network: NetworkModule) -> None:
    plain = network(*inputs()).detach()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert_close(shard(network)(*inputs()).detach(), plain, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_compiled_it_has_the_outputs_of_an_eager_one(network: NetworkModule) -> None:
    eager = network(*inputs()).detach()
    torch._dynamo.reset()
    network.compile(dynamic=False)
    assert_close(network(*inputs()).detach(), eager, rtol=1e-3, atol=1e-4)
