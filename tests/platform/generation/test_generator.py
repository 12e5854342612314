"""A generator's samples become images on one path: latents are decoded by the autoencoder that made the training data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from soflow_core.failures import InputError
from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import SoFlow
from soflow_core.weights import save_weights
from soflow_pipelines.images.convert import to_uint8
from soflow_pipelines.shards.tables import read_info
from soflow_platform.generation.generator import Generator
from tests.support.small_networks import latent_set


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Weights of a network of latents, and the autoencoder of its data."""
    root = tmp_path_factory.mktemp("latent_model")
    autoencoder, data, _ = latent_set(root)
    info = read_info(data)
    config = DiTConfig(*info.shape, 2, 16, 1, 2, classes=info.classes, null_label=True)
    save_weights(root / "ema.safetensors", DiT(config).state_dict(), config, SoFlow(), asdict(info))
    return root / "ema.safetensors", autoencoder


def test_latents_are_decoded_by_the_autoencoder_named(latent_model: tuple[Path, Path]) -> None:
    weights, autoencoder = latent_model
    generator = Generator.open(weights, autoencoder=str(autoencoder))
    assert generator.decoder is not None
    (samples,) = generator.samples([0, 1, 2], [0, 1, 2], seed=0, steps=1)
    (images,) = generator.images([0, 1, 2], [0, 1, 2], seed=0, steps=1)
    assert samples.shape == (3, 4, 8, 8)
    assert images.shape == (3, 3, 16, 16)
    assert torch.equal(images, to_uint8(generator.decoder.decode(samples)))


def test_without_the_autoencoder_three_channels_are_shown_and_why(latent_model: tuple[Path, Path]) -> None:
    weights, _ = latent_model
    generator = Generator.open(weights)
    (images,) = generator.images([0], [0], seed=0, steps=1)
    assert images.shape == (1, 3, 8, 8)
    assert generator.undecoded is not None
    assert "Name its folder as the autoencoder" in generator.undecoded


def test_an_autoencoder_that_is_named_must_be_one(latent_model: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no autoencoder in diffusers' format"):
        Generator.open(latent_model[0], autoencoder=str(tmp_path))


def test_samples_stay_in_the_training_space_without_a_decoder(
    latent_model: tuple[Path, Path],
) -> None:
    generator = Generator.open(latent_model[0], decode=False)
    (decoded,) = generator.decoded([0], [0], seed=0, steps=1)
    (samples,) = generator.samples([0], [0], seed=0, steps=1)
    assert generator.undecoded is None
    assert torch.equal(decoded, samples)


def test_weights_that_are_not_finite_make_no_images(tmp_path: Path) -> None:
    config = DiTConfig(1, 4, 4, 2, 16, 1, 2)
    tensors = dict(DiT(config).state_dict())
    tensors["pos_embed"] = torch.full_like(tensors["pos_embed"], torch.nan)
    save_weights(tmp_path / "ema.safetensors", tensors, config, SoFlow(), {})
    with pytest.raises(InputError, match=r"ema.safetensors has weights that are not finite \(pos_embed\)"):
        Generator.open(tmp_path / "ema.safetensors")


@pytest.mark.parametrize("missing", ["folder", "nothing"])
def test_a_path_that_holds_no_weights_file_is_refused(tmp_path: Path, missing: str) -> None:
    path = tmp_path if missing == "folder" else tmp_path / "nothing.safetensors"
    with pytest.raises(InputError, match="does not hold a generator"):
        Generator.open(path)
