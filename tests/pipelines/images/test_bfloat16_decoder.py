"""Autoencoders that decode in bfloat16: images near those of float32, encodings the same bits, kinds of a user's own as well."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from soflow_pipelines.images.autoencoder import KlAutoencoder, KlKind, load_autoencoder
from soflow_pipelines.images.bfloat16_decoder import in_bfloat16
from soflow_pipelines.images.codec import AutoencoderFacts, ChannelsLastDecoder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return KlKind.example(tmp_path_factory.mktemp("autoencoder"))


def latents() -> Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_an_image_in_bfloat16_is_near_that_of_float32(place: str) -> None:
    expected = load_autoencoder(place).decode(latents())
    decoded = in_bfloat16(load_autoencoder(place), "cpu").decode(latents())
    assert decoded.dtype == torch.float32
    assert not torch.equal(decoded, expected)
    # The largest value has an error of 2^-9 by its own rounding, and some more by those of the layers.
    assert float((decoded - expected).abs().max()) < 2**-5 * float(expected.abs().max())


def test_encoding_has_the_bits_that_it_had(place: str) -> None:
    plain, low = load_autoencoder(place), in_bfloat16(load_autoencoder(place), "cpu")
    assert torch.equal(low.encode(images()), plain.encode(images()))
    assert low.facts == plain.facts


def test_the_decoder_alone_is_laid_out_in_channels_last_memory(place: str) -> None:
    autoencoder = load_autoencoder(place)
    assert isinstance(autoencoder, KlAutoencoder)
    in_bfloat16(autoencoder, "cpu")

    def wide(part: nn.Module) -> list[Tensor]:
        """Weights of convolutions whose layouts differ."""
        weights = [each.weight for each in part.modules() if isinstance(each, nn.Conv2d)]
        return [weight for weight in weights if min(weight.shape[1:3]) > 1]

    for part, last in ((autoencoder.network.decoder, True), (autoencoder.network.encoder, False)):
        assert wide(part)
        assert all(each.is_contiguous(memory_format=torch.channels_last) is last for each in wide(part))


class Enlarging:
    """An autoencoder that encodes and decodes, and no more."""

    def __init__(self) -> None:
        self.facts = AutoencoderFacts("enlarging", "0" * 16, 3, 2, 1.0, 0.0)

    def encode(self, images: Tensor) -> Tensor:
        means = functional.avg_pool2d(images, 2)
        return torch.cat([means, torch.zeros_like(means)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return functional.conv_transpose2d(latents, torch.ones(3, 1, 2, 2), stride=2, groups=3)


def test_a_kind_that_only_encodes_and_decodes_is_decoded_under_autocast() -> None:
    given = latents()[:, :3]
    assert not isinstance(Enlarging(), ChannelsLastDecoder)
    decoded = in_bfloat16(Enlarging(), "cpu").decode(given)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, Enlarging().decode(given.bfloat16().float()))
