"""The contract of an autoencoder, for every registered kind or those of `--autoencoder`, on its `example`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.images.bfloat16_decoder import in_bfloat16
from soflow_pipelines.images.codec import AUTOENCODERS, Autoencoder, AutoencoderError, AutoencoderKind

ROWS, LATENT_SIDE = 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("autoencoders")


@pytest.fixture
def place(autoencoder_class: type[AutoencoderKind], folder: Path) -> str:
    """What names the example."""
    own = folder / autoencoder_class.name
    own.mkdir(exist_ok=True)
    torch.manual_seed(0)
    place = autoencoder_class.example(own)
    if place is None:
        pytest.fail(
            f"the suite has nothing to open {autoencoder_class.__name__} with: define the classmethod `example`"
        )
    return f"{autoencoder_class.name}:{place}"


@pytest.fixture
def autoencoder(place: str) -> Autoencoder:
    return load_autoencoder(place, download=False)


def images(autoencoder: Autoencoder) -> Tensor:
    side = LATENT_SIDE * autoencoder.facts.factor
    return torch.rand(ROWS, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def scaled(autoencoder: Autoencoder, moments: Tensor) -> Tensor:
    """The posterior means as networks take them."""
    return (moments[:, : autoencoder.facts.channels] - autoencoder.facts.shift) * autoencoder.facts.scaling


def test_it_says_what_its_latents_are(
    autoencoder: Autoencoder, autoencoder_class: type[AutoencoderKind]
) -> None:
    facts = autoencoder.facts
    assert facts.id
    assert facts.id.startswith(f"{autoencoder_class.name}:") or autoencoder_class.name == AUTOENCODERS.default
    assert facts.digest, "latents of other weights are told apart"
    assert facts.factor >= 1
    assert facts.scaling > 0


def test_latents_are_moments_of_the_size_that_it_says(autoencoder: Autoencoder) -> None:
    moments = autoencoder.encode(images(autoencoder))
    assert moments.shape == (ROWS, 2 * autoencoder.facts.channels, LATENT_SIDE, LATENT_SIDE)
    assert moments.dtype == torch.float32
    assert moments.device.type == "cpu"
    assert moments.isfinite().all()
    assert (moments[:, autoencoder.facts.channels :] >= 0).all(), "the second half are standard deviations"
    assert not moments.requires_grad


def test_decoded_latents_are_images(autoencoder: Autoencoder) -> None:
    given = images(autoencoder)
    decoded = autoencoder.decode(scaled(autoencoder, autoencoder.encode(given)))
    assert decoded.shape == given.shape
    assert decoded.dtype == torch.float32
    assert decoded.device.type == "cpu"
    assert decoded.isfinite().all()
    assert not decoded.requires_grad


def test_latents_are_decoded_in_bfloat16_too(autoencoder: Autoencoder) -> None:
    """`soflowctl generate --precision bfloat16` decodes so."""
    given = images(autoencoder)
    low = in_bfloat16(autoencoder, "cpu")
    decoded = low.decode(scaled(autoencoder, low.encode(given)))
    assert decoded.shape == given.shape
    assert decoded.dtype == torch.float32
    assert decoded.device.type == "cpu"
    assert decoded.isfinite().all()
    assert low.facts == autoencoder.facts


def test_rows_are_independent_and_nothing_is_drawn(autoencoder: Autoencoder) -> None:
    given, before = images(autoencoder), torch.get_rng_state()
    moments = autoencoder.encode(given)
    decoded = autoencoder.decode(scaled(autoencoder, moments))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(autoencoder.encode(given), moments)
    assert_close(autoencoder.encode(given[1:2]), moments[1:2], rtol=1e-4, atol=1e-5)
    assert_close(autoencoder.decode(scaled(autoencoder, moments[1:2])), decoded[1:2], rtol=1e-4, atol=1e-5)


def test_images_that_differ_have_latents_that_differ(autoencoder: Autoencoder) -> None:
    given = images(autoencoder)
    assert not torch.allclose(autoencoder.encode(given), autoencoder.encode(-given))


def test_it_is_the_same_when_it_is_opened_again(autoencoder: Autoencoder, place: str) -> None:
    again = load_autoencoder(place, download=False)
    assert again.facts == autoencoder.facts
    given = images(autoencoder)
    assert torch.equal(again.encode(given), autoencoder.encode(given))


def test_a_place_that_is_not_there_is_refused_in_a_sentence(
    autoencoder_class: type[AutoencoderKind], tmp_path: Path
) -> None:
    with pytest.raises(AutoencoderError, match="nowhere"):
        load_autoencoder(f"{autoencoder_class.name}:{tmp_path}/nowhere", download=False)
