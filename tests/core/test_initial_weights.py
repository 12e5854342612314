"""A network starts from the weights of another one: what it computes at the start is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soflow_core.initial_weights import fit, read_checkpoint, start_from
from soflow_core.networks import NULL_LABEL, DiT, DiTConfig, UNetConfig
from soflow_core.networks.dit import FinalLayer
from soflow_core.objectives import Diffusion, FlowMatching, MeanFlow, Objective, SoFlow
from soflow_core.weights import Weights, WeightsError
from tests.support.random_networks import CONFIG, random_network

T, S = torch.tensor([0.9, 0.6, 0.3, 0.5]), torch.tensor([0.1, 0.6, 0.0, 0.2])
LABELS = torch.tensor([0, 1, 2, NULL_LABEL])


def inputs(channels: int = 2, side: int = 4) -> Tensor:
    return torch.randn(4, channels, side, side, generator=torch.Generator().manual_seed(1))


def weights_of(network: DiT, objective: Objective) -> Weights:
    return Weights(network.config, objective, tensors=dict(network.state_dict()))


def fresh(config: DiTConfig) -> DiT:
    torch.manual_seed(5)
    return DiT(config)


def test_a_network_of_one_time_is_the_same_at_every_second_time() -> None:
    old, new = random_network(torch.float32), fresh(CONFIG)
    found = start_from(new, weights_of(old, FlowMatching()), "soflow")
    assert found.notes == ("the embedding of the second time is new and has no effect at the start",)
    x = inputs()
    with torch.no_grad():
        expected = old(x, T, T, LABELS)
        for s in (T, S, torch.zeros(4)):
            torch.testing.assert_close(new(x, T, s, LABELS), expected, rtol=1e-5, atol=1e-6)
    # It can learn: the layer before the zeros is not zero.
    new(x, T, S, LABELS).square().mean().backward()
    gradient = new.s_embedder.mlp[2].weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_a_network_of_two_times_is_taken_as_it_is() -> None:
    old, new = random_network(torch.float32), fresh(CONFIG)
    found = start_from(new, weights_of(old, SoFlow()), "meanflow")
    assert found.notes == ()
    for name, tensor in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("before", "now", "labels"),
    [
        ({"classes": None, "null_label": False}, {}, LABELS),
        ({}, {"classes": None, "null_label": False}, None),
        ({}, {"null_label": False}, torch.tensor([0, 1, 2, 2])),
        ({"guidance_scale": True}, {}, LABELS),
        ({}, {"guidance_scale": True}, LABELS),
    ],
)
def test_other_conditions_change_nothing_at_the_start(
    before: dict[str, Any], now: dict[str, Any], labels: Tensor | None
) -> None:
    torch.manual_seed(3)
    old = DiT(replace(CONFIG, **before))
    for parameter in old.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    new = fresh(replace(CONFIG, **now))
    found = start_from(new, weights_of(old, SoFlow()), "soflow")
    assert len(found.notes) == 1
    x = inputs()
    given = None if old.config.classes is None else LABELS if labels is None else labels
    if labels is None:
        given = torch.full((4,), NULL_LABEL)
    with torch.no_grad():
        torch.testing.assert_close(new(x, T, S, labels), old(x, T, S, given), rtol=1e-5, atol=1e-5)


def test_a_new_null_label_is_the_mean_of_all() -> None:
    old, new = fresh(replace(CONFIG, null_label=False)), fresh(CONFIG)
    found = start_from(new, weights_of(old, SoFlow()), "soflow")
    assert found.notes == ("the null label is new, the mean of all labels",)
    assert old.y_embedder is not None
    assert new.y_embedder is not None
    table = new.y_embedder.embedding_table.weight
    torch.testing.assert_close(table[-1], table[:-1].mean(dim=0))


def test_what_does_not_fit_is_named_and_new() -> None:
    old = random_network(torch.float32)
    new = fresh(replace(CONFIG, channels=3, height=8, width=8, classes=7))
    before = new.state_dict()["x_embedder.proj.weight"].clone()
    found = start_from(new, weights_of(old, SoFlow()), "soflow")
    assert found.notes == (
        "the patch embedding is new (2 channels in patches of 2 before, 3 channels in patches of 2 now)",
        "the output layer is new (2 channels in patches of 2 before, 3 channels in patches of 2 now)",
        "positions are those of 8 x 8",
        "the label table is new (3 classes before, 7 now)",
    )
    assert torch.equal(new.state_dict()["x_embedder.proj.weight"], before)
    name = "blocks.1.mlp.fc1.weight"
    assert name in found.copied
    assert torch.equal(new.state_dict()[name], old.state_dict()[name])


def test_another_trunk_is_refused() -> None:
    source = weights_of(random_network(torch.float32), SoFlow())
    for name, value in {"depth": 3, "hidden": 32, "heads": 4, "mlp_ratio": 2.0}.items():
        with pytest.raises(WeightsError, match=f"with {name} "):
            fit(source, replace(CONFIG, **{name: value}), "soflow")


class OneTime(DiT):
    """A network as SiT and DiT have it: one time, and twice the channels in its output."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.final_layer = FinalLayer(config.hidden, config.patch, 2 * config.channels)
        torch.manual_seed(7)
        for parameter in self.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        for parameter in self.s_embedder.parameters():
            torch.nn.init.zeros_(parameter)

    def unpatchify(self, pixels: Tensor) -> Tensor:
        c = self.config
        rows, columns = c.height // c.patch, c.width // c.patch
        grid = pixels.reshape(-1, rows, columns, c.patch, c.patch, 2 * c.channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, 2 * c.channels, c.height, c.width)

    def saved(self, path: Path, wrap: bool) -> Path:
        """A checkpoint of its official code; its bare weights where `wrap` is false."""
        state = {n: t for n, t in self.state_dict().items() if not n.startswith("s_embedder.")}
        torch.save({"model": {n: 2 * t for n, t in state.items()}, "ema": state} if wrap else state, path)
        return path


@pytest.mark.parametrize("wrap", [True, False])
def test_sit_is_a_velocity_with_time_and_sign_reversed(tmp_path: Path, wrap: bool) -> None:
    official = OneTime(CONFIG)
    path = official.saved(tmp_path / "sit.pt", wrap)
    source = read_checkpoint(path, CONFIG, layout="sit")
    assert (source.network_config, source.objective) == (CONFIG, FlowMatching())
    new = fresh(CONFIG)
    start_from(new, source, "soflow")
    x = inputs()
    with torch.no_grad():
        towards_data = official(x, 1 - T, 1 - T, LABELS)[:, :2]
        for s in (T, S):
            torch.testing.assert_close(new(x, T, s, LABELS), -towards_data, rtol=1e-4, atol=1e-5)


def test_dit_predicts_noise_at_step_numbers(tmp_path: Path) -> None:
    official, number = OneTime(CONFIG), torch.tensor([999.0, 500.0, 3.0, 0.0])
    source = read_checkpoint(official.saved(tmp_path / "dit.pt", True), CONFIG, layout="dit")
    assert source.objective == Diffusion()
    new = fresh(CONFIG)
    found = start_from(new, source, "diffusion")
    x = inputs()
    with torch.no_grad():
        expected = official(x, number, number, LABELS)[:, :2]
        torch.testing.assert_close(new(x, number, number, LABELS), expected, rtol=1e-5, atol=1e-6)
    assert found.notes == ()
    assert any("predict different things" in note for note in fit(source, CONFIG, "soflow").notes)


def test_raw_weights_and_those_of_the_ema_are_told_apart(tmp_path: Path) -> None:
    path = OneTime(CONFIG).saved(tmp_path / "sit.pt", True)
    ema, raw = (read_checkpoint(path, CONFIG, which, "dit").tensors for which in ("ema", "raw"))
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(2 * ema[name], raw[name])


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    bare = OneTime(CONFIG).saved(tmp_path / "bare.pt", False)
    with pytest.raises(WeightsError, match="say sit or dit"):
        read_checkpoint(bare, CONFIG)
    with pytest.raises(WeightsError, match="lacks s_embedder"):
        read_checkpoint(bare, CONFIG, layout="soflow")
    with pytest.raises(WeightsError, match="none of model"):
        read_checkpoint(bare, CONFIG, "raw", "sit")
    torch.save({"epoch": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="not a DiT checkpoint"):
        read_checkpoint(tmp_path / "other.pt", CONFIG, layout="sit")
    broken = weights_of(random_network(torch.float32), SoFlow())
    del broken.tensors["blocks.0.attn.qkv.bias"]
    with pytest.raises(WeightsError, match=r"lack blocks\.0\.attn\.qkv\.bias"):
        start_from(fresh(CONFIG), broken, "soflow")


def test_weights_that_were_given_s_are_not_taken_by_a_network_that_is_given_its_distance() -> None:
    """As MeanFlow's in PyTorch, imported with `--second-time time`: the shapes are the same, and what they mean is not."""
    source = weights_of(fresh(replace(CONFIG, second_time="time")), MeanFlow())
    with pytest.raises(WeightsError, match=r"second time is s and this one's is t - s: .* other weights"):
        fit(source, CONFIG, "soflow")
    assert fit(source, replace(CONFIG, second_time="time"), "soflow").notes == ()


@pytest.mark.parametrize("method", ["flow_matching", "soflow"])
def test_a_network_without_a_second_time_takes_weights_of_its_kind(method: str) -> None:
    config = replace(CONFIG, second_time="none")
    old, new = fresh(config), DiT(config)
    assert start_from(new, weights_of(old, FlowMatching()), method).notes == ()
    for name, tensor in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], tensor), name


def test_a_unet_is_taken_whole_whatever_its_dropout_and_what_was_not_trained_is_said() -> None:
    config = UNetConfig.example(channels=2, height=4, width=4, classes=3)
    old, new = config.build(), replace(config, null_label=True, dropout=0.3).build()
    source = Weights(config, FlowMatching(drop=0.0), tensors=dict(old.state_dict()))
    found = start_from(new, source, "soflow")
    assert found.notes == (
        "the second time is embedded as it was, and was trained at s = t alone",
        "the null label is new, a vector of zeros",
    )
    assert all(torch.equal(new.state_dict()[name], tensor) for name, tensor in old.state_dict().items())
    assert fit(source, config, "flow_matching").notes == ()
    with pytest.raises(WeightsError, match=r"give both the same settings \(attention\)"):
        fit(source, replace(config, attention=()), "soflow")
