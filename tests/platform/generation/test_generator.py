"""A generator's samples become images on one path: latents are decoded by the autoencoder that made the training data."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soflow_core.failures import InputError
from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import SoFlow
from soflow_core.weights import load_weights, save_weights
from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.images.codec import AutoencoderError
from soflow_pipelines.images.convert import to_uint8
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.tables import read_info
from soflow_platform.generation.decoding import decode_samples
from soflow_platform.generation.generator import Generator
from tests.support.small_networks import latent_set

SHARED = Path(os.environ.get("SOFLOW_TEST_DATA") or Path(__file__).parents[4] / "shared")
AUTOENCODER = SHARED / "models" / "kl-f8-mini"


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


def test_without_its_autoencoder_a_latent_model_is_refused(latent_model: tuple[Path, Path]) -> None:
    with pytest.raises(AutoencoderError) as caught:
        Generator.open(latent_model[0])
    (sentence,) = str(caught.value).splitlines()
    assert sentence.startswith("this network makes latents of the autoencoder autoencoder (weights ")
    assert "--autoencoder FOLDER" in sentence
    assert "--latents" in sentence


def test_the_wrong_autoencoder_is_refused_with_both_names(
    latent_model: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(latent_model[1], other)
    tensors = load_file(other / "diffusion_pytorch_model.safetensors")
    next(iter(tensors.values())).add_(1)
    save_file(tensors, other / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        AutoencoderError, match=r"the latents are of autoencoder \(.*\), the autoencoder named is other"
    ):
        Generator.open(latent_model[0], autoencoder=str(other))


def test_a_decoded_image_does_not_depend_on_how_many_are_decoded(latent_model: tuple[Path, Path]) -> None:
    generator = Generator.open(latent_model[0], autoencoder=str(latent_model[1]))
    (samples,) = generator.samples(range(19), [0] * 19, seed=0, steps=1)
    together = decode_samples(samples, generator.decoder)
    for size in (1, 3, 8, 11):
        apart = torch.cat([decode_samples(part, generator.decoder) for part in samples.split(size)])
        assert torch.equal(apart, together)


def test_weights_that_do_not_name_their_data_are_decoded_by_the_one_named(
    latent_model: tuple[Path, Path], tmp_path: Path
) -> None:
    weights, autoencoder = latent_model
    known = load_weights(weights)
    assert known.objective is not None
    save_weights(tmp_path / "ema.safetensors", known.tensors, known.network_config, known.objective, {})
    with pytest.raises(AutoencoderError, match=r"samples of 4 channels .* --autoencoder FOLDER"):
        Generator.open(tmp_path / "ema.safetensors")
    (expected,) = Generator.open(weights, autoencoder=str(autoencoder)).images([3], [1], seed=0, steps=1)
    named = Generator.open(tmp_path / "ema.safetensors", autoencoder=str(autoencoder))
    assert torch.equal(next(named.images([3], [1], seed=0, steps=1)), expected)


def test_an_autoencoder_that_is_named_must_be_one(latent_model: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no autoencoder in diffusers' format"):
        Generator.open(latent_model[0], autoencoder=str(tmp_path))


def test_samples_stay_in_the_training_space_without_a_decoder(
    latent_model: tuple[Path, Path],
) -> None:
    generator = Generator.open(latent_model[0], decode=False)
    (decoded,) = generator.decoded([0], [0], seed=0, steps=1)
    (samples,) = generator.samples([0], [0], seed=0, steps=1)
    assert generator.decoder is None
    assert torch.equal(decoded, samples)


def test_weights_that_are_not_finite_make_no_images(tmp_path: Path) -> None:
    config = DiTConfig(1, 4, 4, 2, 16, 1, 2)
    tensors = dict(DiT(config).state_dict())
    tensors["pos_embed"] = torch.full_like(tensors["pos_embed"], torch.nan)
    save_weights(tmp_path / "ema.safetensors", tensors, config, SoFlow(), {})
    with pytest.raises(InputError, match=r"ema.safetensors has weights that are not finite \(pos_embed\)"):
        Generator.open(tmp_path / "ema.safetensors")


def test_samples_that_are_not_finite_make_no_images(tmp_path: Path) -> None:
    config = DiTConfig(1, 8, 8, 4, 16, 1, 2, classes=10, null_label=True)
    large = {
        name: torch.full_like(value, 3e38) if "final" in name else value
        for name, value in DiT(config).state_dict().items()
    }
    save_weights(tmp_path / "w.safetensors", large, config, SoFlow(), {})
    generator = Generator.open(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"image 7 that these weights make is not finite: .* take another"):
        list(generator.images([7, 8], [0, 1], seed=0, steps=1))
    with pytest.raises(InputError, match="is not finite"):
        generator.png([0], seed=0, steps=1)


@pytest.mark.parametrize("missing", ["folder", "nothing"])
def test_a_path_that_holds_no_weights_file_is_refused(tmp_path: Path, missing: str) -> None:
    path = tmp_path if missing == "folder" else tmp_path / "nothing.safetensors"
    with pytest.raises(InputError, match="does not hold a generator"):
        Generator.open(path)


@pytest.mark.skipif(not AUTOENCODER.is_dir(), reason=f"no {AUTOENCODER} (set SOFLOW_TEST_DATA)")
def test_a_real_autoencoder_gives_images_eight_times_as_large(tmp_path: Path) -> None:
    decoder = load_autoencoder(str(AUTOENCODER))
    facts = decoder.facts
    info = DatasetInfo(
        kind="latents",
        shape=(4, 8, 8),
        dtype="float16",
        classes=3,
        autoencoder=facts.id,
        autoencoder_digest=facts.digest,
        scaling=facts.scaling,
        shift=facts.shift,
    )
    config = DiTConfig(4, 8, 8, 2, 16, 1, 2, classes=3, null_label=True)
    weights = tmp_path / "ema.safetensors"
    save_weights(weights, DiT(config).state_dict(), config, SoFlow(), asdict(info))
    generator = Generator.open(weights, autoencoder=str(AUTOENCODER))
    (samples,) = generator.samples([7, 8], [0, 2], seed=1, steps=1)
    (images,) = generator.images([7, 8], [0, 2], seed=1, steps=1)
    assert images.shape == (2, 3, 64, 64)
    assert int((images.int() - to_uint8(decoder.decode(samples)).int()).abs().max()) <= 1
