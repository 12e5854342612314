"""Checkpoints of published code load by their names and shapes, and are the functions that their own code computes."""

from __future__ import annotations

import argparse
import math
import resource
import time
import zipfile
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from soflow_core.networks import DiT, DiTConfig
from soflow_core.published import Conventions, read_published
from soflow_core.weights import Weights, WeightsError, build_network
from tests.support.reference_cases import load_case

CONFIG = DiTConfig(
    channels=4, height=8, width=8, patch=2, hidden=16, depth=2, heads=2, classes=3, null_label=True
)
CONVENTIONS = Conventions(heads=2, null_label=True)


def foreign(first: str, second: str | None, variances: bool = False) -> dict[str, Tensor]:
    """Random tensors in the names of another code's time embeddings; `variances`: with twice as many output channels."""
    torch.manual_seed(1)
    tensors = {}
    for name, tensor in DiT(CONFIG).state_dict().items():
        head, dot, rest = name.partition(".")
        renamed = {"t_embedder": first, "s_embedder": second}.get(head, head)
        if variances and head == "final_layer" and rest.startswith("linear"):
            tensor = torch.cat([tensor, tensor])
        if renamed is not None:
            random = torch.randn_like(tensor) * 0.2
            tensors[renamed + dot + rest] = tensor if name == "pos_embed" else random
    return tensors


def sinusoids(t: Tensor) -> Tensor:
    """(B,) -> (B, 256)."""
    angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    return torch.cat([angles.cos(), angles.sin()], 1)


def compute(
    tensors: dict[str, Tensor], x: Tensor, times: dict[str, Tensor], labels: Tensor, heads: int = 2
) -> Tensor:
    """What a SiT with these tensors computes, from the tensors alone; `times` has what each embedding is given."""

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def modulated(value: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return nnf.layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    condition = tensors["y_embedder.embedding_table.weight"][labels]
    for name, given in times.items():
        condition = condition + linear(f"{name}.mlp.2", nnf.silu(linear(f"{name}.mlp.0", sinusoids(given))))
    condition = nnf.silu(condition)
    patches = nnf.conv2d(x, tensors["x_embedder.proj.weight"], tensors["x_embedder.proj.bias"], stride=2)
    h = patches.flatten(2).transpose(1, 2) + tensors["pos_embed"]
    batch, tokens, width = h.shape
    for block in ("blocks.0", "blocks.1"):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(
            f"{block}.adaLN_modulation.1", condition
        ).chunk(6, 1)
        qkv = linear(f"{block}.attn.qkv", modulated(h, shift_a, scale_a))
        q, k, v = qkv.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, tokens, width)
        h = h + gate_a[:, None] * linear(f"{block}.attn.proj", mixed)
        inner = nnf.gelu(linear(f"{block}.mlp.fc1", modulated(h, shift_m, scale_m)), approximate="tanh")
        h = h + gate_m[:, None] * linear(f"{block}.mlp.fc2", inner)
    shift, scale = linear("final_layer.adaLN_modulation.1", condition).chunk(2, 1)
    pixels = linear("final_layer.linear", modulated(h, shift, scale))
    return torch.einsum("nhwpqc->nchpwq", pixels.reshape(batch, 4, 4, 2, 2, -1)).reshape(batch, -1, 8, 8)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


X = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T, S = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.2]), torch.tensor([0.0, 0.4, 0.5, 0.1, 0.0])
LABELS = torch.tensor([0, 1, 2, 3, 1])


@pytest.mark.parametrize(
    ("names", "prefix", "key", "second", "method"),
    [
        (
            ("noise_labels_embedder", "noise_labels_next_embedder"),
            "module.model.",
            "ema",
            "difference",
            "alphaflow",
        ),
        (("t_embedder", "r_embedder"), "", "ema", "difference", "meanflow"),
        (("t_embedder", "r_embedder"), "_orig_mod.", "ema", "time", "meanflow"),
        (("t_embedder", "s_embedder"), "module.network.", "ema_model", "difference", "soflow"),
        (("t_embedder", "h_embedder"), "", None, "difference", "meanflow"),
    ],
)
def test_networks_with_two_times_are_what_their_code_computes(
    tmp_path: Path,
    names: tuple[str, str],
    prefix: str,
    key: str | None,
    second: Literal["difference", "time"],
    method: str,
) -> None:
    tensors = foreign(*names)
    state = {prefix + name: tensor for name, tensor in tensors.items()}
    arguments = argparse.Namespace(model="SiT-B/4", epochs=3)
    content = state if key is None else {key: state, "args": arguments, "steps": 3}
    path = saved(tmp_path / "published.pt", content)
    weights = read_published(path, conventions=Conventions(2, True, second))
    assert weights.objective is not None
    assert weights.objective.method == method
    assert weights.network_config.second_time == second
    given = {names[0]: T, names[1]: T - S if second == "difference" else S}
    with torch.no_grad():
        found = build_network(weights)(X, T, S, LABELS)
    expected = compute(tensors, X, given, LABELS)
    assert expected.std() > 0.1
    assert torch.allclose(found, expected, atol=2e-5), (found - expected).abs().max()


@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize("variances", [False, True])
def test_a_network_with_one_time_is_a_velocity_with_noise_at_one(
    tmp_path: Path, noise_at: Literal[0, 1], variances: bool
) -> None:
    tensors = foreign("t_embedder", None, variances)
    path = saved(tmp_path / "sit.pt", {"ema": tensors, "model": tensors})
    with pytest.raises(WeightsError, match="do not say whether the noise is at 0"):
        read_published(path, conventions=CONVENTIONS)
    weights = read_published(path, conventions=Conventions(2, True, noise_at=noise_at))
    assert weights.objective is not None
    assert (weights.objective.method, weights.network_config.second_time) == ("flow_matching", "none")
    with torch.no_grad():
        found = build_network(weights)(X, T, T, LABELS)
    own = T if noise_at == 1 else 1 - T
    expected = compute(tensors, X, {"t_embedder": own}, LABELS)[:, :4] * (1 if noise_at == 1 else -1)
    assert torch.allclose(found, expected, atol=2e-5), (found - expected).abs().max()


def alphaflow(**beside: Tensor) -> dict[str, dict[str, Tensor]]:
    tensors = foreign("noise_labels_embedder", "noise_labels_next_embedder")
    return {"ema": {**{f"model.{name}": tensor for name, tensor in tensors.items()}, **beside}}


def read(path: Path) -> Weights:
    return read_published(path, conventions=CONVENTIONS)


def test_statistics_of_latents_are_their_normalization(tmp_path: Path) -> None:
    beside = {
        "autoencoder_mean": torch.full((1, 4, 1, 1), 0.25, dtype=torch.float64),
        "autoencoder_var": torch.full((1, 4, 1, 1), 4.0, dtype=torch.float64),
        "are_ldm_stats_inited": torch.tensor(1.0),
        "autoencoder.decoder.weight": torch.zeros(3),
    }
    weights = read(saved(tmp_path / "a.pt", alphaflow(**beside)))
    assert weights.data == {"scaling": pytest.approx(0.5), "shift": 0.25}
    beside["autoencoder_var"] = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1, 1)
    with pytest.raises(WeightsError, match=r"normalized by channel or place \(autoencoder_var\)"):
        read(saved(tmp_path / "b.pt", alphaflow(**beside)))


@pytest.mark.parametrize(
    ("names", "added", "message"),
    [
        (
            ("t_embedder", "r_embedder"),
            "w_embedder.mlp.0.weight",
            "embeddings of times are r_embedder, t_embedder, w_embedder; known",
        ),
        (
            ("time_in", "guidance_in"),
            None,
            "embeddings of times are guidance_in, time_in; known are t_embedder and s_embedder",
        ),
        (
            ("t_embedder", "r_embedder"),
            "blocks.0.attn.q_norm.weight",
            "'blocks.0.attn.q_norm.weight', which a network",
        ),
        (("t_embedder", "r_embedder"), "projectors.0.weight", "'projectors.0.weight', which a network"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, names: tuple[str, str], added: str | None, message: str
) -> None:
    tensors = foreign(*names)
    if added is not None:
        tensors[added] = torch.zeros(16)
    path = saved(tmp_path / "other.pt", {"ema": tensors})
    with pytest.raises(WeightsError, match=message):
        build_network(read(path))


def test_tensors_beside_the_network_that_are_not_known_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"has discriminator\.weight beside the network model, which is not known"
    ):
        read(saved(tmp_path / "a.pt", alphaflow(**{"discriminator.weight": torch.zeros(2)})))


@pytest.mark.parametrize(
    "content", [{"ema_model": 5}, {"ema_model": {"pos_embed": torch.zeros(2)}}, [1], {"ema_model": {}}, {}]
)
def test_a_file_of_other_content_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(WeightsError, match=r"official.pt"):
        read(saved(tmp_path / "official.pt", content))


@pytest.mark.parametrize("prefix", ["network.", "module.network."])
def test_official_files_load_as_tensors_by_their_shapes(
    tmp_path: Path, reference_settings: dict[str, Any], reference_tensors: dict[str, Tensor], prefix: str
) -> None:
    case = load_case("imagenet", reference_settings, reference_tensors)
    state = {prefix + name: tensor for name, tensor in case.network.state_dict().items()}
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    path = saved(tmp_path / "official.pt", {"model": other, "ema_model": state, "step": 3})
    weights = read(path)
    assert weights.network_config == case.network.config
    loaded = build_network(weights)
    x, t, s = case.tensors["x1"], case.tensors["t"], case.tensors["s"]
    with torch.no_grad():
        assert torch.equal(loaded(x, t, s, case.labels), case.network(x, t, s, case.labels))
    trained = read_published(path, "model", CONVENTIONS)
    assert not trained.tensors["pos_embed"].any()
    with pytest.raises(WeightsError, match="how many heads"):
        read_published(path)
    with pytest.raises(WeightsError, match="11 rows; say whether the last one is the null label"):
        read_published(path, conventions=Conventions(heads=2))
    torch.save({"optimizer": {}, "step": 3}, path)
    with pytest.raises(WeightsError, match="has no ema_model or ema; it holds optimizer, step"):
        read(path)


def test_a_file_with_more_than_tensors_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds more than tensors"):
        read(saved(tmp_path / "official.pt", {"ema_model": {}, "settings": CONFIG}))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04junk", b"junk"])
def test_a_file_that_is_damaged_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "official.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"official.pt"):
        read_published(tmp_path / "official.pt")


def test_tensors_that_repeat_one_value_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    """A view of one number as a matrix takes a few bytes of a file."""
    tensors = foreign("t_embedder", "r_embedder")
    tensors["blocks.0.attn.qkv.weight"] = torch.zeros(1).expand(3 * 2**16, 2**16)
    path = saved(tmp_path / "views.pt", {"ema": tensors})
    assert path.stat().st_size < 2**20
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match=r"its tensors 51,\d+,\d+,\d+: they are no weights"):
        read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert time.process_time() - begin < 2


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = saved(tmp_path / "stored.pt", {"ema": {"x": torch.zeros(2**21)}})
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    assert packed.stat().st_size < 2**17
    with pytest.raises(WeightsError, match=r"its parts 8,\d+,\d+: it is compressed"):
        read(packed)
