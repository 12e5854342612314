"""Weights files: round trips, damaged files."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from soflow_core.guidance import Guidance
from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import OBJECTIVES, FlowMatching, Objective, SoFlow
from soflow_core.published import Conventions, read_published
from soflow_core.settings import to_dict
from soflow_core.times import LogitNormal
from soflow_core.weights import HEADER, WeightsError, build_network, load_weights, save_weights

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
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
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


def header() -> dict[str, Any]:
    """The header of a sound file of CONFIG and OBJECTIVE."""
    return {"format": 1, "network": to_dict(CONFIG), "objective": to_dict(OBJECTIVE), "data": {}}


def write_with_header(path: Path, text: str, tensors: dict[str, Tensor] | None = None) -> Path:
    """A weights file with this header."""
    save_file(dict(tensors or DiT(CONFIG).state_dict()), path, metadata={HEADER: text})
    return path


def test_the_header_of_these_tests_is_sound(tmp_path: Path) -> None:
    assert build_network(load_weights(write_with_header(tmp_path / "w.safetensors", json.dumps(header()))))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "no JSON object"),
        ("5", "no JSON object"),
        ("null", "no JSON object"),
        ("{", "header of .* cannot be used"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_header_that_is_no_json_object_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(WeightsError, match=says):
        load_weights(write_with_header(tmp_path / "w.safetensors", text))


@pytest.mark.parametrize("name", ["format", "network", "objective", "data"])
@pytest.mark.parametrize("value", [[], None, "x", 7, True, float("nan")])
def test_a_part_of_the_header_that_has_another_type_is_refused(
    tmp_path: Path, name: str, value: object
) -> None:
    with pytest.raises(WeightsError, match=rf"{name}|method"):
        load_weights(write_with_header(tmp_path / "w.safetensors", json.dumps({**header(), name: value})))
    incomplete = {key: part for key, part in header().items() if key != name}
    with pytest.raises(WeightsError, match=f"lacks {name}"):
        load_weights(write_with_header(tmp_path / "w.safetensors", json.dumps(incomplete)))


@pytest.mark.parametrize(
    ("section", "changes", "says"),
    [
        ("network", {"hidden": "16"}, "DiTConfig.hidden is '16'; a whole number is needed"),
        ("network", {"hidden": -4}, "hidden is -4; it must be above 0"),
        ("network", {"hidden": 10**9}, "at most 65536"),
        ("network", {"depth": 1.5}, "depth is 1.5"),
        ("network", {"depth": True}, "depth is True"),
        ("network", {"depth": 0}, "depth is 0"),
        ("network", {"patch": 0}, "patch is 0"),
        ("network", {"heads": -1}, "heads is -1"),
        ("network", {"mlp_ratio": float("inf")}, "mlp_ratio is inf; a finite number"),
        ("network", {"mlp_ratio": 10**400}, "a finite number"),
        ("network", {"classes": 10**12}, "classes is 1000000000000"),
        ("network", {"null_label": 1}, "null_label is 1; true or false"),
        ("network", {"channels": None}, "channels is None"),
        ("objective", {"method": []}, "method is"),
        ("objective", {"method": "other"}, "method is 'other'; known are alphaflow"),
        ("objective", {"weight_power": "x"}, "weight_power is 'x'; a finite number"),
        ("objective", {"weight_power": float("nan")}, "weight_power is nan; a finite number"),
        ("objective", {"guidance": "x"}, "guidance is 'x'"),
        ("objective", {"guidance": {"scale": float("nan")}}, "scale is nan; a finite number"),
        ("objective", {"schedule": [1]}, "schedule is"),
        ("objective", {"path": ["linear"]}, "path is"),
    ],
)
def test_a_setting_of_the_header_out_of_its_type_or_range_is_refused(
    tmp_path: Path, section: str, changes: dict[str, Any], says: str
) -> None:
    changed = {**header(), section: {**header()[section], **changes}}
    with pytest.raises(WeightsError, match=says):
        load_weights(write_with_header(tmp_path / "w.safetensors", json.dumps(changed)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden": 40_000}, r"the network needs \(.*40000"),
        ({"hidden": 65_536, "heads": 2, "mlp_ratio": 256.0}, "the network needs"),
        ({"depth": 1_024}, "more tensors than the"),
        ({"classes": 2**24}, r"the network needs \(16777216"),
        ({"height": 16_384, "width": 16_384}, "the network needs"),
    ],
)
def test_shapes_are_compared_before_memory_is_taken(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    text = json.dumps({**header(), "network": {**header()["network"], **changes}})
    weights = load_weights(write_with_header(tmp_path / "w.safetensors", text))
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match=says):
        build_network(weights)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    if dtype is torch.float8_e4m3fn and value == float("inf"):
        pytest.skip("this type has no infinity")
    tensors = dict(DiT(CONFIG).state_dict())
    name = "blocks.0.mlp.fc2.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 5] = value
    tensors[name] = tensors[name].to(dtype)
    path = write_with_header(tmp_path / "w.safetensors", json.dumps(header()), tensors)
    with pytest.raises(WeightsError, match=r"not finite \(blocks.0.mlp.fc2.weight\)"):
        load_weights(path)
    torch.save({"ema_model": tensors}, tmp_path / "official.pt")
    with pytest.raises(WeightsError, match="not finite"):
        read_published(tmp_path / "official.pt", conventions=Conventions(2, False))
