"""The digits classifier: how well it reads, and that everyone gets the same one."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from soflow_pipelines.features import FeatureError, digits_classifier, held_out
from soflow_pipelines.features.digits import DIGITS_VERSION, DigitsClassifier
from soflow_pipelines.metrics.label_agreement import count_label_matches
from soflow_pipelines.sources.digits import load_digits


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """The folder of the trained classifier, and what torch's generator draws after the training where its seed was 5 before."""
    folder = tmp_path_factory.mktemp("features")
    torch.manual_seed(5)
    digits_classifier(folder)
    return folder, torch.rand(3)


@pytest.fixture
def cache(trained: tuple[Path, torch.Tensor]) -> Path:
    return trained[0]


def test_it_reads_at_least_97_of_100_digits_it_never_saw(cache: Path) -> None:
    images, labels = held_out(load_digits())
    seen = digits_classifier(cache)(images)
    assert seen.logits is not None
    assert len(labels) == 360
    assert count_label_matches(seen.logits, labels) / len(labels) >= 0.97


def test_features_have_the_stated_width_and_carry_no_gradient(cache: Path) -> None:
    network = digits_classifier(cache)
    seen = network(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    assert seen.features.shape == (3, network.dim)
    assert seen.features.dtype == torch.float32
    assert not seen.features.requires_grad


def test_features_are_float32_under_autocast_too(cache: Path) -> None:
    network, images = digits_classifier(cache), torch.from_numpy(load_digits().images[:8])
    plain = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        cast = network(images)
    assert torch.equal(cast.features, plain.features)
    assert cast.logits is not None
    assert plain.logits is not None
    assert torch.equal(cast.logits, plain.logits)


def test_the_global_generator_is_left_alone(trained: tuple[Path, torch.Tensor]) -> None:
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), trained[1])


def _identity(cache: Path) -> str:
    return digits_classifier(cache).id


@pytest.mark.slow
def test_processes_that_train_it_at_once_get_the_same_weights(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        identities = pool.map(_identity, [tmp_path] * 2)
    assert len(set(identities)) == 1
    assert identities[0].startswith("digits-cnn-1-")
    assert [path.name for path in tmp_path.iterdir()] == ["digits-cnn-1.safetensors"]


def test_images_of_another_size_are_refused(cache: Path) -> None:
    with pytest.raises(ValueError, match="8, 8"):
        digits_classifier(cache)(torch.zeros(1, 1, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("damage", ["cut", "not finite"])
def test_a_damaged_file_of_the_classifier_is_refused(tmp_path: Path, damage: str) -> None:
    tensors = DigitsClassifier().state_dict()
    if damage == "not finite":
        tensors["head.bias"] = torch.full_like(tensors["head.bias"], torch.nan)
    content = save(tensors)
    path = tmp_path / f"{DIGITS_VERSION}.safetensors"
    path.write_bytes(content[:-9] if damage == "cut" else content)
    with pytest.raises(FeatureError, match="is damaged: delete it"):
        digits_classifier(tmp_path)
