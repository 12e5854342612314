"""Images per second of a preparation against a plain loop in one process, on the sample images.

python benchmarks/prepare.py [--images FILE] [--autoencoder DIR] [--repeat 3]

Both decode, crop to 256 x 256, encode with the autoencoder and store mean and standard deviation in float16.
The loop is what one writes first: one image after the other, encoded in batches, an .npy file for each. Its
torch has all cores. The preparation is timed with Ray's start and without.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from soflow_pipelines.images.autoencoder import KlAutoencoder, load_autoencoder
from soflow_pipelines.images.convert import to_unit_range
from soflow_pipelines.images.decode import centre_crop, decode_image, to_array
from soflow_platform.cluster.actor_pool import Progress
from soflow_platform.jobs.prepare import PrepareRequest, prepare

SHARED = Path(os.environ.get("SOFLOW_TEST_DATA") or Path(__file__).parents[2] / "shared")
BATCH = 32
SIZE = 256


def plain_loop(images: Path, autoencoder: str | None, out: Path) -> float:
    """Seconds of the loop, the autoencoder loaded before."""
    network = load_autoencoder(autoencoder) if autoencoder else None
    out.mkdir(parents=True)
    started = time.perf_counter()
    with zipfile.ZipFile(images) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        for start in range(0, len(names), BATCH):
            chosen = names[start : start + BATCH]
            pixels = np.stack(
                [to_array(centre_crop(decode_image(archive.read(name), name), SIZE)) for name in chosen]
            )
            arrays = pixels if network is None else _encode(network, pixels)
            for name, array in zip(chosen, arrays, strict=True):
                np.save(out / f"{Path(name).stem}.npy", array)
    return time.perf_counter() - started


def _encode(network: KlAutoencoder, pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
    return network.encode(to_unit_range(torch.from_numpy(pixels))).numpy().astype(np.float16)


def preparation(images: Path, autoencoder: str | None, out: Path) -> tuple[float, float, int]:
    """(seconds with Ray's start and the listing, images per second once builders work, images)."""
    started = time.perf_counter()
    first: list[tuple[float, int]] = []

    def note(progress: Progress) -> None:
        if progress.done and not first:
            first.append((time.perf_counter(), progress.done))

    request = PrepareRequest(str(images), str(out), resolution=SIZE, autoencoder=autoencoder, batch=BATCH)
    total = prepare(request, report=note).info.samples
    ended = time.perf_counter()
    at, done = first[0]
    return ended - started, (total - done) / (ended - at), total


def compare(images: Path, autoencoder: str | None, repeat: int, folder: Path) -> None:
    loops, whole, running, count = [], [], [], 0
    for number in range(repeat):
        seconds = plain_loop(images, autoencoder, folder / f"loop-{number}")
        with_start, working, count = preparation(images, autoencoder, folder / f"set-{number}")
        loops.append(count / seconds)
        whole.append(count / with_start)
        running.append(working)
    print(
        f"{count} images to {'latents' if autoencoder else 'pixels'}, medians of {repeat}, in images per second:"
    )
    loop = statistics.median(loops)
    for name, rates in (
        ("plain loop", loops),
        ("prepare, Ray's start in it", whole),
        ("prepare, once it works", running),
    ):
        print(
            f"{name:>28} {statistics.median(rates):8.1f}   {statistics.median(rates) / loop:5.2f} x the loop"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, default=SHARED / "data" / "imagenet-sample.zip")
    parser.add_argument("--autoencoder", type=Path, default=SHARED / "models" / "kl-f8-mini")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    for path in (arguments.images, arguments.autoencoder):
        if not path.exists():
            print(f"{path} is not there; name another, or set SOFLOW_TEST_DATA", file=sys.stderr)
            return 2
    folder = Path(tempfile.mkdtemp(prefix="prepare-"))
    try:
        compare(arguments.images, None, arguments.repeat, folder / "pixels")
        compare(arguments.images, str(arguments.autoencoder), arguments.repeat, folder / "latents")
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
