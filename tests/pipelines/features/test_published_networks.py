"""Inception, DINOv2 and CLIP: their outputs, and weight files that are missing or differ from the published ones."""

import pickle
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from soflow_pipelines.features import FeatureError, clip, inception, open_features
from soflow_pipelines.features.dinov2 import MEAN, STD
from soflow_pipelines.features.inception import WEIGHTS
from soflow_pipelines.storage.files import sha256
from tests.support.random_weights import Bomb, clip_tensors, dinov2_tensors, save_as_program, save_inception


def pictures(count: int, side: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), generator=draw, dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(autouse=True)
def no_weights_but_those_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("INCEPTION", "DINOV2", "CLIP"):
        monkeypatch.delenv(f"SOFLOW_{name}_WEIGHTS", raising=False)


def test_inception_gives_the_features_of_torch_fidelity(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFLOW_INCEPTION_WEIGHTS", str(inception_file))
    network = open_features("inception", tmp_path)
    images = pictures(3)
    seen = network(images)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(inception_file))
    kept: list[Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *parts: kept.append(parts[2]))
    features, logits = theirs(images)
    assert torch.equal(seen.features, features)
    assert seen.logits is not None
    assert torch.equal(seen.logits, logits)
    # The order of ADM's spatial statistics: row, column, then channel.
    assert seen.spatial is not None
    assert seen.spatial.shape == (3, 17 * 17 * 7)
    for row, column, channel in ((0, 0, 0), (0, 1, 6), (16, 3, 2)):
        ours = seen.spatial[:, (row * 17 + column) * 7 + channel]
        assert torch.equal(ours, kept[0][:, channel, row, column])

    grey = pictures(1, channels=1)
    assert torch.equal(network(grey).features, network(grey.repeat(1, 3, 1, 1)).features)
    assert network.id.startswith("inception-1-")
    assert "published" in network.warnings[0]
    with pytest.raises(ValueError, match="uint8"):
        network(pictures(1).float())


def by_hand(tensors: dict[str, Tensor], images: Tensor) -> Tensor:
    """DINOv2's class token, written out from its description, for images of 224 x 224."""
    pixels = (images.double() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    w = {name: tensor.double() for name, tensor in tensors.items()}
    width = w["cls_token"].shape[-1]
    patches = functional.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    tokens = patches.flatten(2).transpose(1, 2)
    grid = w["pos_embed"][0, 1:].reshape(37, 37, width).permute(2, 0, 1)[None]
    scale = 16.1 / 37
    positions = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    tokens = tokens + positions.flatten(2).transpose(1, 2)
    x = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(len(images), -1, -1), tokens], dim=1)
    for number in range(2):
        b = {name.split(".", 2)[2]: t for name, t in w.items() if name.startswith(f"blocks.{number}.")}
        y = functional.layer_norm(x, (width,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        q, k, v = functional.linear(y, b["attn.qkv.weight"], b["attn.qkv.bias"]).chunk(3, dim=-1)
        attention = torch.softmax(q @ k.transpose(1, 2) / width**0.5, dim=-1) @ v
        x = x + b["ls1.gamma"] * functional.linear(attention, b["attn.proj.weight"], b["attn.proj.bias"])
        y = functional.layer_norm(x, (width,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = functional.gelu(functional.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + b["ls2.gamma"] * functional.linear(y, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    return functional.layer_norm(x, (width,), w["norm.weight"], w["norm.bias"], 1e-6)[:, 0]


def test_dinov2_is_the_network_that_its_file_describes(tmp_path: Path) -> None:
    tensors = dinov2_tensors()
    torch.save(tensors, tmp_path / "dinov2_vitl14_pretrain.pth")
    network = open_features("dinov2", tmp_path)
    images = pictures(3, side=224)
    features = network(images).features
    assert features.shape == (3, network.dim) == (3, 64)
    torch.testing.assert_close(features.double(), by_hand(tensors, images), atol=2e-5, rtol=2e-5)
    small = pictures(2, side=40)
    resized = interpolate_bilinear_2d_like_tensorflow1x(small.float(), size=(224, 224), align_corners=False)
    torch.testing.assert_close(
        network(small).features.double(), by_hand(tensors, resized), atol=2e-5, rtol=2e-5
    )


def test_clip_gives_the_features_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = clip_tensors()
    theirs = FeatureExtractorCLIP(
        "clip-vit-b-32", ["clip"], str(save_as_program(tensors, tmp_path / "program.pt"))
    )
    torch.save(tensors, tmp_path / "tensors.pth")
    monkeypatch.setenv("SOFLOW_CLIP_WEIGHTS", str(tmp_path / "tensors.pth"))
    network = open_features("clip", tmp_path)
    images = pictures(3)
    (features,) = theirs(images)
    assert network.dim == 32
    torch.testing.assert_close(network(images).features, features, atol=1e-5, rtol=1e-5)
    # A TorchScript file is a program: only the published one is opened.
    monkeypatch.setenv("SOFLOW_CLIP_WEIGHTS", str(tmp_path / "program.pt"))
    with pytest.raises(FeatureError, match="cannot be read as a file of named tensors"):
        open_features("clip", tmp_path)
    published = replace(clip.WEIGHTS, sha256=sha256(tmp_path / "program.pt"))
    monkeypatch.setattr(clip, "WEIGHTS", published)
    network = open_features("clip", tmp_path)
    assert network.warnings == ()
    torch.testing.assert_close(network(images).features, features, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("inception", "weights-inception-2015-12-05-6726825d.pth"),
        ("dinov2", "dinov2_vitl14_pretrain.pth"),
        ("clip", "ViT-B-32.pt"),
    ],
)
def test_missing_weights_are_named_with_where_to_put_them(tmp_path: Path, name: str, file: str) -> None:
    with pytest.raises(FeatureError, match=f"needs the weights {file}") as caught:
        open_features(name, tmp_path, download=False)
    assert f"into {tmp_path}, or set SOFLOW_{name.upper()}_WEIGHTS" in str(caught.value)


def test_published_weights_are_fetched_once_and_checked(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(inception_file.parent)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/{inception_file.name}"
        monkeypatch.setattr(inception, "WEIGHTS", replace(WEIGHTS, url=url))
        with pytest.raises(FeatureError, match="invalid hash"):
            open_features("inception", tmp_path)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
        published = replace(WEIGHTS, url=url, sha256=sha256(inception_file))
        monkeypatch.setattr(inception, "WEIGHTS", published)
        assert open_features("inception", tmp_path / "cache").warnings == ()
    finally:
        server.shutdown()
        server.server_close()
    assert open_features("inception", tmp_path / "cache").warnings == ()


def test_a_server_that_cannot_be_reached_is_named_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "WEIGHTS", replace(WEIGHTS, url="http://127.0.0.1:1/weights.pth"))
    with pytest.raises(FeatureError, match=r"cannot be fetched .*refused"):
        open_features("inception", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_named_file_that_is_not_there_is_not_replaced_by_another(
    inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / WEIGHTS.names[0]).symlink_to(inception_file)
    monkeypatch.setenv("SOFLOW_INCEPTION_WEIGHTS", str(tmp_path / "other.pth"))
    with pytest.raises(FeatureError, match=r"SOFLOW_INCEPTION_WEIGHTS=.*other.pth: there is no such file"):
        open_features("inception", tmp_path)


def test_weights_are_never_unpickled_as_code(tmp_path: Path) -> None:
    torch.save({"weights": Bomb(tmp_path / "exploded")}, tmp_path / WEIGHTS.names[0])
    with pytest.raises(FeatureError, match="cannot be read as a file of named tensors"):
        open_features("inception", tmp_path, download=False)
    (tmp_path / WEIGHTS.names[0]).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(FeatureError, match="cannot be read as a file of named tensors"):
        open_features("inception", tmp_path, download=False)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["inception", "dinov2", "clip"])
def test_weights_of_something_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    torch.save({"weight": torch.from_numpy(np.ones(3))}, tmp_path / "other.pth")
    monkeypatch.setenv(f"SOFLOW_{name.upper()}_WEIGHTS", str(tmp_path / "other.pth"))
    with pytest.raises(FeatureError, match="does not hold the weights"):
        open_features(name, tmp_path)


def test_a_name_that_is_none_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"no feature network 'vgg'; there are inception, dinov2, clip"):
        open_features("vgg", tmp_path)
