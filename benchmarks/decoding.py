"""Images per second of decoding latents in channels-last bfloat16 over float32, and its error in terms of FID, on the sample images.

python benchmarks/decoding.py [--images FILE] [--autoencoder DIR] [--features pooled random] [--rounds 3] [--small]

The images are cropped to 256 x 256 and encoded by the autoencoder in float32; the posterior means are decoded in both precisions, in
turn, as `soflowctl generate` decodes samples: eight at a time, on one thread of a CPU. Then, on 8-bit images, the Fréchet distance of
the two decoded sets, that of each from the originals, as FID is, and that of two halves of the float32 set, which is what the choice
of images alone makes of one distribution. `pooled` are averages of 8 x 8 blocks, which see layout and colour; `random` are averages
over the image of the 288 channels behind the first ten layers of torchvision's Inception v3, with random weights and the originals'
mean and variance in its normalizations, which see texture. Neither is FID's network: `--features inception` is, where its weights are.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from soflow_pipelines.features.network import FeatureError, normalized
from soflow_pipelines.features.registry import FEATURE_NAMES, open_features
from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.images.bfloat16_decoder import in_bfloat16
from soflow_pipelines.images.codec import Autoencoder
from soflow_pipelines.images.convert import to_uint8, to_unit_range
from soflow_pipelines.images.decode import centre_crop, decode_image, to_array
from soflow_pipelines.metrics.fid import FeatureStatistics, frechet_distance
from soflow_platform.cluster.actor_pool import deterministic_torch
from soflow_platform.generation.decoding import decode_samples

SHARED = Path(os.environ.get("SOFLOW_TEST_DATA") or Path(__file__).parents[2] / "shared")
RANDOM = "random"
LAYERS = 10
"""Of Inception v3, whose random weights give features: up to Mixed_5d."""
BATCH = 8
SMALL_IMAGES, SMALL_SIZE = 16, 64
FLOAT32, BFLOAT16 = "float32", "bfloat16"

Network = Callable[[Tensor], Tensor]
"""uint8 images (B, 3, H, W) -> features (B, D)."""


def read_images(archive: Path, size: int, most: int | None) -> Tensor:
    """(N, 3, size, size) uint8, cropped as for training."""
    with zipfile.ZipFile(archive) as source:
        names = [name for name in source.namelist() if not name.endswith("/")][:most]
        arrays = [to_array(centre_crop(decode_image(source.read(name), name), size)) for name in names]
    return torch.from_numpy(np.stack([np.broadcast_to(each, (3, size, size)) for each in arrays]))


def scaled_latents(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> posterior means (N, C, h, w), as networks take them."""
    facts = autoencoder.facts
    means = [
        autoencoder.encode(to_unit_range(part))[:, : facts.channels].float() for part in images.split(BATCH)
    ]
    return (torch.cat(means) - facts.shift) * facts.scaling


@dataclass(frozen=True)
class Decoded:
    """Images of one precision."""

    images: Tensor
    """(N, 3, H, W) uint8"""
    rates: list[float]
    """Images per second of each round."""


def decode(decoders: dict[str, Autoencoder], latents: Tensor, rounds: int) -> dict[str, Decoded]:
    """Latents (N, C, h, w) by each decoder, in turn, after a first call."""
    made: dict[str, Tensor] = {}
    rates: dict[str, list[float]] = {name: [] for name in decoders}
    for decoder in decoders.values():
        decode_samples(latents[:BATCH], decoder)
    for _ in range(rounds):
        for name, decoder in decoders.items():
            started = time.perf_counter()
            made[name] = decode_samples(latents, decoder)
            rates[name].append(len(latents) / (time.perf_counter() - started))
    return {name: Decoded(to_uint8(images), rates[name]) for name, images in made.items()}


def random_inception(originals: Tensor, device: str) -> Network:
    """Channels behind the first layers of Inception v3 with random weights: behind all of them small differences have grown large."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    whole = inception_v3(weights=None, aux_logits=False, init_weights=False)
    network = torch.nn.Sequential(*list(whole.children())[:LAYERS]).to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return network(normalized(images.to(device), 299, (0.5,) * 3, (0.5,) * 3)).mean(dim=(2, 3))

    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            # The mean over all batches.
            part.momentum = None
    network.train()
    for part in originals.split(4 * BATCH):
        features(part)
    network.eval()
    return features


def open_network(name: str, originals: Tensor, device: str) -> Network:
    """Features by name. Raises FeatureError where they cannot be had."""
    if name == RANDOM:
        return random_inception(originals, device)
    with tempfile.TemporaryDirectory() as cache:
        network = open_features(name, Path(cache), device, download=False, shape=originals.shape[1:])

    def features(images: Tensor) -> Tensor:
        given = to_unit_range(images) if network.space == "training" else images
        return network(given.to(device)).features

    return features


def distances(network: Network, originals: Tensor, decoded: dict[str, Decoded]) -> dict[str, float]:
    """Fréchet distances between sets of images."""
    found = {"originals": _features(network, originals)}
    found |= {name: _features(network, each.images) for name, each in decoded.items()}
    half = len(originals) // 2
    found |= {"first half": found[FLOAT32][:half], "second half": found[FLOAT32][half:]}
    moments = {}
    for name, features in found.items():
        gathered = FeatureStatistics(features.shape[1])
        gathered.update(features)
        moments[name] = gathered.moments()
    pairs = {
        "of both": (FLOAT32, BFLOAT16),
        "float32 from originals": (FLOAT32, "originals"),
        "bfloat16 from originals": (BFLOAT16, "originals"),
        "of halves": ("first half", "second half"),
    }
    return {name: frechet_distance(moments[a], moments[b]) for name, (a, b) in pairs.items()}


def _features(network: Network, images: Tensor) -> Tensor:
    return torch.cat([network(part).cpu() for part in images.split(BATCH)])


def print_rates(decoded: dict[str, Decoded], rounds: int) -> None:
    """Prints images per second of both precisions, their ratio, and by how much pixels differ."""
    one, other = decoded[FLOAT32], decoded[BFLOAT16]
    ratio = statistics.median(b / a for a, b in zip(one.rates, other.rates, strict=True))
    print(
        f"decoding, medians of {rounds}: float32 {statistics.median(one.rates):.2f} images/s, bfloat16 "
        f"{statistics.median(other.rates):.2f} images/s, bfloat16 over float32 {ratio:.3f}",
        flush=True,
    )
    difference = (one.images.int() - other.images.int()).abs()
    mean, most, equal = difference.float().mean(), difference.max(), (difference == 0).float().mean()
    print(
        f"pixels of 255: mean difference {mean:.3f}, largest {most}, {100 * equal:.1f} % are equal",
        flush=True,
    )


def print_distances(names: list[str], originals: Tensor, decoded: dict[str, Decoded], device: str) -> None:
    """Prints a table of Fréchet distances, a row for each feature network that can be had."""
    lines, absent = [], []
    for name in names:
        try:
            found = distances(open_network(name, originals, device), originals, decoded)
        except FeatureError as error:
            absent.append(f"no {name}: {error}")
            continue
        share = found["of both"] / found["of halves"]
        cells = [*(f"{value:.4g}" for value in found.values()), f"{share:.3g}"]
        if not lines:
            lines = [f"| Fréchet distance on | {' | '.join([*found, 'of both over of halves'])} |"]
            lines.append("|---" * (len(cells) + 1) + "|")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join([*lines, *absent]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, default=SHARED / "data" / "imagenet-sample.zip")
    parser.add_argument("--autoencoder", type=Path, default=SHARED / "models" / "kl-f8-mini")
    parser.add_argument(
        "--features",
        nargs="+",
        default=["pooled", RANDOM],
        metavar="NAME",
        help=f"{RANDOM}, or one of {', '.join(FEATURE_NAMES)}; weights are not fetched",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="few images of 64 x 64, one round")
    arguments = parser.parse_args()
    for path in (arguments.images, arguments.autoencoder):
        if not path.exists():
            print(f"{path} is not there; name another, or set SOFLOW_TEST_DATA", file=sys.stderr)
            return 2
    size, most, rounds = (SMALL_SIZE, SMALL_IMAGES, 1) if arguments.small else (256, None, arguments.rounds)
    device = deterministic_torch(1)
    originals = read_images(arguments.images, size, most)
    plain, low = (load_autoencoder(str(arguments.autoencoder), device) for _ in range(2))
    latents = scaled_latents(plain, originals)
    print(f"{len(originals)} images of {size} x {size}, {plain.facts.id}, on {device}", flush=True)
    decoded = decode({FLOAT32: plain, BFLOAT16: in_bfloat16(low, device)}, latents, rounds)
    print_rates(decoded, rounds)
    print_distances(arguments.features, originals, decoded, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
