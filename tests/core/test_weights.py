"""Weights files: round trips, damaged files, official checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from soflow_core.guidance import Guidance
from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import OBJECTIVES, FlowMatching, Objective, SoFlow
from soflow_core.times import LogitNormal
from soflow_core.weights import build_network, load_weights, read_official, save_weights
from tests.support.reference_cases import load_case

CONFIG = DiTConfig(channels=1, height=4, width=8, patch=2, hidden=16, depth=1, heads=2, classes=3)
OBJECTIVE = SoFlow(path="trigonometric", guidance=Guidance(scale=2.0, drop=0.2), weight_power=0.5)


@pytest.mark.parametrize(
    "objective",
    [OBJECTIVE, FlowMatching(time=LogitNormal(0.3, 0.9)), *(kind() for kind in OBJECTIVES.values())],
    ids=lambda objective: objective.method,
)
def test_a_round_trip_gives_the_same_network_settings_and_facts(tmp_path: Path, objective: Objective) -> None:
    network = DiT(CONFIG)
    facts = {"kind": "pixels", "shape": [1, 4, 8], "class_names": ["a", "b", "c"]}
    save_weights(tmp_path / "w.safetensors", network.state_dict(), CONFIG, objective, facts)
    weights = load_weights(tmp_path / "w.safetensors")
    assert (weights.network_config, weights.objective, weights.data) == (CONFIG, objective, facts)
    draws = weights.objective.draw(torch.Generator().manual_seed(0), 2, (1, 4, 8), conditional=True)
    assert draws.noise.shape == (2, 1, 4, 8)
    loaded = build_network(weights)
    assert not loaded.training
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in network.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_wrong_shapes_and_missing_names_are_told(tmp_path: Path) -> None:
    network = DiT(CONFIG)
    tensors = dict(network.state_dict())
    tensors["final_layer.linear.bias"] = torch.zeros(5)
    save_weights(tmp_path / "w.safetensors", tensors, CONFIG, OBJECTIVE, {})
    with pytest.raises(
        ValueError, match=r"final_layer.linear.bias of shape \(5,\); the network needs \(4,\)"
    ):
        build_network(load_weights(tmp_path / "w.safetensors"))
    del tensors["final_layer.linear.bias"]
    save_weights(tmp_path / "w.safetensors", tensors, CONFIG, OBJECTIVE, {})
    with pytest.raises(ValueError, match=r"lack final_layer.linear.bias"):
        build_network(load_weights(tmp_path / "w.safetensors"))


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, DiT(CONFIG).state_dict(), CONFIG, OBJECTIVE, {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_weights(path)


@pytest.mark.parametrize("prefix", ["network.", "module.network."])
def test_official_files_load_as_tensors_by_their_shapes(
    tmp_path: Path, reference_settings: dict[str, Any], reference_tensors: dict[str, Tensor], prefix: str
) -> None:
    case = load_case("imagenet", reference_settings, reference_tensors)
    state = {prefix + name: tensor for name, tensor in case.network.state_dict().items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": other, "ema_model": state, "step": 3}, tmp_path / "official.pt")
    weights = read_official(tmp_path / "official.pt", "ema_model", heads=2, null_label=True)
    assert weights.network_config == case.network.config
    loaded = build_network(weights)
    x, t, s = case.tensors["x1"], case.tensors["t"], case.tensors["s"]
    with torch.no_grad():
        assert torch.equal(loaded(x, t, s, case.labels), case.network(x, t, s, case.labels))
    other = read_official(tmp_path / "official.pt", "model", heads=2, null_label=True)
    assert not other.tensors["pos_embed"].any()
    with pytest.raises(ValueError, match="how many heads"):
        read_official(tmp_path / "official.pt")
    with pytest.raises(ValueError, match="11 rows; say whether the last one is the null label"):
        read_official(tmp_path / "official.pt", heads=2)
    with pytest.raises(ValueError, match="has no optimizer; it holds model, ema_model, step"):
        read_official(tmp_path / "official.pt", "optimizer", heads=2)


def test_a_file_with_more_than_tensors_is_not_run(tmp_path: Path) -> None:
    torch.save({"ema_model": {}, "settings": CONFIG}, tmp_path / "official.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_official(tmp_path / "official.pt")
