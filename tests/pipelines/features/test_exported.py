"""A feature network that a user exports: a torch.export program and a JSON file that describes its input."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from soflow_pipelines.features import FeatureError, open_features
from tests.support.random_weights import Bomb


class Corners(nn.Module):
    """The first pixel of each channel, and as logits twice that."""

    def __init__(self, logits: bool) -> None:
        super().__init__()
        self.logits = logits
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Any:
        features = images[:, :, 0, 0]
        return (features, features * self.factor) if self.logits else features


def export(folder: Path, two_outputs: bool = False, fixed: bool = False, **described: Any) -> str:
    content = {"name": "corners", "size": [4, 6], "range": [-1, 3], **described}
    example = torch.zeros(2, content.get("channels", 3), *content["size"])
    shapes = None if fixed else ({0: Dim("batch")},)
    program = torch.export.export(Corners(two_outputs), (example,), dynamic_shapes=shapes)
    torch.export.save(program, folder / "net.pt2")
    (folder / "net.json").write_text(json.dumps(content))
    return f"file:{folder / 'net.pt2'}"


def test_the_program_sees_images_in_the_size_and_range_it_asks_for(tmp_path: Path) -> None:
    network = open_features(export(tmp_path), tmp_path)
    images = torch.zeros(3, 3, 4, 6, dtype=torch.uint8)
    images[0, :, 0, 0] = torch.tensor([0, 255, 51])
    seen = network(images)
    assert network.dim == 3
    torch.testing.assert_close(seen.features[0], torch.tensor([-1.0, 3.0, -0.2]))
    assert seen.logits is None
    assert "is" not in network.metrics
    other = torch.full((1, 3, 9, 7), 51, dtype=torch.uint8)
    torch.testing.assert_close(network(other).features, torch.full((1, 3), -0.2))


def test_one_channel_is_repeated_for_a_program_of_three(tmp_path: Path) -> None:
    network = open_features(export(tmp_path), tmp_path)
    grey = torch.full((2, 1, 4, 6), 255, dtype=torch.uint8)
    assert torch.equal(network(grey).features, torch.full((2, 3), 3.0))


def test_a_program_of_one_channel_takes_no_colours(tmp_path: Path) -> None:
    network = open_features(export(tmp_path, channels=1), tmp_path)
    assert network(torch.zeros(2, 1, 4, 6, dtype=torch.uint8)).features.shape == (2, 1)
    with pytest.raises(ValueError, match="takes 1 channels"):
        network(torch.zeros(2, 3, 4, 6, dtype=torch.uint8))


@pytest.mark.parametrize(("logits", "extra"), [("classes", {"is"}), ("labels", {"is", "label_agreement"})])
def test_logits_open_the_metrics_they_are_good_for(tmp_path: Path, logits: str, extra: set[str]) -> None:
    network = open_features(export(tmp_path, True, logits=logits), tmp_path)
    assert network.metrics == {"fd", "kid", "precision", "recall"} | extra
    seen = network(torch.full((2, 3, 4, 6), 255, dtype=torch.uint8))
    assert seen.logits is not None
    assert torch.equal(seen.logits, torch.full((2, 3), 6.0))


def test_the_id_changes_with_the_program_and_its_description(tmp_path: Path) -> None:
    ids = set()
    for number, described in enumerate([{}, {"range": [-1, 2]}, {"version": "2"}, {"logits": "classes"}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        ids.add(open_features(export(folder, "logits" in described, **described), tmp_path).id)
    assert len(ids) == 4
    assert all(id.startswith("file-corners-") for id in ids)


def test_images_are_not_resized_where_the_description_says_none(tmp_path: Path) -> None:
    network = open_features(export(tmp_path, resize="none"), tmp_path)
    with pytest.raises(ValueError, match=r"takes images of \(4, 6\), not of \(8, 8\)"):
        network(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("described", "match"),
    [
        ({"size": [0, 4]}, '"size" is'),
        ({"range": [1, 0]}, '"range" is'),
        ({"resize": "nearest"}, '"resize" is one of bilinear, bicubic, none'),
        ({"logits": "yes"}, '"logits" is one of'),
        ({"channels": 4}, '"channels" is one of 1, 3'),
        ({"scale": 2}, "'scale' is not known; there are name, size"),
        ({"name": "a/b"}, '"name" is letters'),
    ],
)
def test_a_description_that_is_wrong_is_named(tmp_path: Path, described: dict[str, Any], match: str) -> None:
    place = export(tmp_path)
    content = json.loads((tmp_path / "net.json").read_text())
    (tmp_path / "net.json").write_text(json.dumps(content | described))
    with pytest.raises(FeatureError, match=match):
        open_features(place, tmp_path)


def test_a_program_without_its_description_is_refused_with_an_example(tmp_path: Path) -> None:
    place = export(tmp_path)
    (tmp_path / "net.json").unlink()
    with pytest.raises(FeatureError, match=r"net.json is missing.*\"size\": \[224, 224\]"):
        open_features(place, tmp_path)


def test_a_program_exported_for_one_size_of_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match="dynamic first dimension"):
        open_features(export(tmp_path, fixed=True), tmp_path)


def test_outputs_other_than_described_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"does not give features \(B, D\) and logits"):
        open_features(export(tmp_path, False, logits="classes"), tmp_path)


@pytest.mark.parametrize("content", [None, b"no program"])
def test_what_is_no_program_is_named(tmp_path: Path, content: bytes | None) -> None:
    place = export(tmp_path)
    (tmp_path / "net.pt2").unlink()
    if content is not None:
        (tmp_path / "net.pt2").write_bytes(content)
    with pytest.raises(FeatureError, match=r"net.pt2 cannot be read as a torch.export program"):
        open_features(place, tmp_path)


def test_parts_of_a_program_are_never_unpickled_as_code(tmp_path: Path) -> None:
    place = export(tmp_path)
    torch.save({"sample": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "net.pt2") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (inputs,) = [name for name in parts if "sample_inputs" in name]
    parts[inputs] = (tmp_path / "bomb.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    with pytest.raises(FeatureError, match=r"cannot be read as a torch\.export program"):
        open_features(place, tmp_path)
    assert not (tmp_path / "exploded").exists()
    # The bomb itself is a live one.
    pickle.loads(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert (tmp_path / "exploded").exists()
