"""The DiT: sizes, first output, conditions, shapes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_core.networks import NULL_LABEL, DiT, DiTConfig, dit_config
from soflow_core.networks.dit import sincos_positions
from tests.support.reference_cases import load_case


def parameters_in_millions(size: str) -> tuple[float, float]:
    with torch.device("meta"):
        network = DiT(dit_config(size, channels=4, height=32, width=32, classes=1000, null_label=True))
    counts = [(p.numel(), p.requires_grad) for p in network.parameters()]
    return sum(n for n, _ in counts) / 1e6, sum(n for n, trained in counts if trained) / 1e6


@pytest.mark.parametrize(
    ("size", "total", "trained"),
    [
        ("B/4", 131.21, 131.17),
        ("B/2", 131.29, 131.09),
        ("M/2", 308.28, 308.02),
        ("L/2", 459.40, 459.14),
        ("XL/2", 676.74, 676.44),
    ],
)
def test_parameter_counts_of_the_named_sizes(size: str, total: float, trained: float) -> None:
    assert parameters_in_millions(size) == pytest.approx((total, trained), abs=0.005)


def random_network(**changes: Any) -> DiT:
    settings = {
        "channels": 3,
        "height": 4,
        "width": 8,
        "patch": 2,
        "hidden": 16,
        "depth": 2,
        "heads": 2,
        "classes": 5,
        "null_label": True,
        **changes,
    }
    torch.manual_seed(0)
    network = DiT(DiTConfig(**settings))
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return network


def inputs(network: DiT, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    c = network.config
    x = torch.randn(batch, c.channels, c.height, c.width, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.1, 0.5, 0.0])


def test_a_new_network_is_zero_everywhere() -> None:
    network = DiT(replace(dit_config("S/4", 4, 8, 8, classes=10, null_label=True), depth=2))
    x, t, s = inputs(network)
    assert not network(x, t, s, torch.tensor([0, 1, NULL_LABEL])).any()


def test_initial_scales() -> None:
    network = DiT(replace(dit_config("B/4", 4, 32, 32, classes=1000, null_label=True), depth=4))
    parameters = dict(network.named_parameters())
    for name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
        assert parameters[name].std().item() == pytest.approx(0.02, rel=0.02)
    assert parameters["s_embedder.mlp.0.weight"].std().item() == pytest.approx(0.044, abs=0.001)
    assert parameters["s_embedder.mlp.2.weight"].std().item() == pytest.approx(0.036, abs=0.001)
    assert parameters["blocks.3.attn.qkv.weight"].std().item() == pytest.approx(
        (2 / (4 * 768)) ** 0.5, rel=0.01
    )
    patch = parameters["x_embedder.proj.weight"].flatten(1)
    assert patch.abs().max().item() == pytest.approx((6 / sum(patch.shape)) ** 0.5, rel=0.01)
    zero = [name for name, p in parameters.items() if not p.any()]
    assert {name for name in zero if name.endswith("weight")} == {
        *(f"blocks.{i}.adaLN_modulation.1.weight" for i in range(4)),
        "final_layer.adaLN_modulation.1.weight",
        "final_layer.linear.weight",
    }


@pytest.mark.parametrize(
    ("channels", "height", "width", "patch"), [(1, 8, 8, 2), (4, 32, 32, 8), (3, 12, 4, 4), (2, 6, 6, 2)]
)
@pytest.mark.parametrize("classes", [None, 5])
def test_output_has_the_shape_of_the_input(
    channels: int, height: int, width: int, patch: int, classes: int | None
) -> None:
    network = random_network(
        channels=channels,
        height=height,
        width=width,
        patch=patch,
        classes=classes,
        null_label=classes is not None,
    )
    x, t, s = inputs(network)
    labels = None if classes is None else torch.tensor([0, 4, NULL_LABEL])
    assert network(x, t, s, labels).shape == x.shape


@pytest.mark.parametrize("shape", [(3, 3, 8, 4), (3, 3, 4, 4), (3, 1, 4, 8)])
def test_an_input_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    """A tall input has as many patches as a wide one."""
    network = random_network()
    _, t, s = inputs(network)
    with pytest.raises(ValueError, match=r"this network takes \(3, 4, 8\)"):
        network(torch.zeros(shape), t, s)


def test_positions_are_those_of_the_reference(
    reference_settings: dict[str, Any], reference_tensors: dict[str, Tensor]
) -> None:
    case = load_case("imagenet", reference_settings, reference_tensors)
    assert_close(
        sincos_positions(32, 4, 4)[None], case.tensors["weights/network.pos_embed"], rtol=0, atol=2e-7
    )


def test_a_wide_image_is_not_a_tall_one() -> None:
    positions = sincos_positions(16, 2, 3)
    columns, rows = positions[:, :8], positions[:, 8:]
    assert torch.equal(columns[0], columns[3])
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[3])


def test_patches_go_back_where_they_came_from() -> None:
    """A network whose blocks are closed and whose last layer undoes its first is the identity up to the
    norm.
    """
    network = random_network(hidden=48, heads=2)
    c = network.config
    x, _, _ = inputs(network)
    pixels = x.reshape(3, c.channels, 2, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(3, 8, 12)
    assert torch.equal(network.unpatchify(pixels), x)


def test_no_labels_the_null_label_and_its_index_are_one() -> None:
    network = random_network()
    x, t, s = inputs(network)
    null = network(x, t, s, torch.full((3,), NULL_LABEL))
    assert torch.equal(network(x, t, s, None), null)
    assert torch.equal(network(x, t, s, torch.full((3,), 5)), null)
    assert not torch.allclose(network(x, t, s, torch.tensor([0, 1, 2])), null)


def test_without_a_null_label_labels_must_be_given() -> None:
    network = random_network(null_label=False)
    x, t, s = inputs(network)
    with pytest.raises(ValueError, match="no null label"):
        network(x, t, s, None)


def test_the_second_time_enters_as_its_distance_from_the_first() -> None:
    network = random_network()
    with torch.no_grad():
        for p in network.t_embedder.parameters():
            p.zero_()
    x, t, s = inputs(network)
    labels = torch.tensor([0, 1, 2])
    assert_close(network(x, t, s, labels), network(x, t - 0.05, s - 0.05, labels), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(network(x, t, s, labels), network(x, t, s - 0.05, labels), rtol=1e-4)


def test_rows_do_not_see_each_other() -> None:
    network = random_network()
    x, t, s = inputs(network)
    labels = torch.tensor([0, 1, 2])
    together = network(x, t, s, labels)
    for i in range(3):
        row = slice(i, i + 1)
        assert_close(network(x[row], t[row], s[row], labels[row]), together[row], rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_give_the_same_gradient() -> None:
    network = random_network()
    x, t, s = inputs(network)
    gradients = []
    for checkpoint_blocks in (False, True):
        network.checkpoint_blocks = checkpoint_blocks
        network.zero_grad()
        network(x, t, s, torch.tensor([0, 1, 2])).square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "4 x 8 is not divisible by a patch of 3"),
        ({"heads": 3}, "does not split over 3 heads"),
        ({"hidden": 18}, "multiple of 4"),
        ({"classes": None}, "null_label needs classes"),
    ],
)
def test_impossible_architectures_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_network(**changes)


@pytest.mark.parametrize("name", ["XXL/2", "B/3", "B"])
def test_unknown_sizes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="unknown network size"):
        dit_config(name, channels=4, height=32, width=32)


def test_bfloat16_weights_see_times_in_float32() -> None:
    network = random_network()
    (x, t, s), labels = inputs(network), torch.tensor([0, 4, NULL_LABEL])
    with torch.no_grad():
        expected = network(x, t, s, labels)
        result = network.bfloat16()(x.bfloat16(), t, s, labels)
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).square().mean() < 1e-3 * expected.square().mean()
