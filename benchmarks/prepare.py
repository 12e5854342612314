"""Images per second of a preparation against a plain loop in one process, on the sample images.

python benchmarks/prepare.py [--images FILE] [--copies 10] [--autoencoder DIR] [--repeat 3]

Both decode, crop to 256 x 256, encode with the autoencoder and store mean and standard deviation in float16. The loop is
what one writes first: one image after the other, encoded in batches, an .npy file for each. On all cores its torch has all
of them. The preparation, which has its files reach the disk, is timed in this process, from the listing to the finished
set, on one core and on all, and on a Ray from the first image to the last, without its start. Each repetition does all of
them in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.images.codec import Autoencoder
from soflow_pipelines.images.convert import to_unit_range
from soflow_pipelines.images.decode import centre_crop, decode_image, to_array
from soflow_pipelines.preparation.state import begin
from soflow_pipelines.storage.opening import open_storage
from soflow_platform.cluster.actor_pool import Progress
from soflow_platform.cluster.connection import Cluster, connected
from soflow_platform.jobs import prepare_here
from soflow_platform.jobs.prepare import PrepareRequest, build_on, make_plan, prepare

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


def _encode(network: Autoencoder, pixels: NDArray[np.uint8]) -> NDArray[np.float16]:
    return network.encode(to_unit_range(torch.from_numpy(pixels))).numpy().astype(np.float16)


def repeated(images: Path, copies: int, out: Path) -> tuple[Path, int]:
    """(a zip file with every image of another one so many times, under other names; their number)."""
    count = 0
    with zipfile.ZipFile(images) as source, zipfile.ZipFile(out, "w") as target:
        for entry in source.infolist():
            if entry.is_dir():
                continue
            name, content = Path(entry.filename), source.read(entry)
            for copy in range(copies):
                target.writestr(str(name.with_name(f"{name.stem}-{copy}{name.suffix}")), content)
            count += copies
    return out, count


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """In the block, this process and the threads it begins run on one core."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Comparison:
    """One kind of set, and where its copies go."""

    images: Path
    count: int
    autoencoder: str | None
    folder: Path

    def request(self, name: str) -> PrepareRequest:
        """A preparation into a new folder."""
        out = str(self.folder / name)
        return PrepareRequest(
            str(self.images), out, resolution=SIZE, autoencoder=self.autoencoder, batch=BATCH
        )

    def loop(self, name: str) -> float:
        """Images per second of the loop."""
        rate = self.count / plain_loop(self.images, self.autoencoder, self.folder / name)
        shutil.rmtree(self.folder / name)
        return rate

    def here(self, name: str) -> float:
        """Images per second of the command in this process."""
        started = time.perf_counter()
        prepare(self.request(name))
        rate = self.count / (time.perf_counter() - started)
        shutil.rmtree(self.folder / name)
        return rate

    def on_ray(self, name: str, cluster: Cluster) -> float:
        """Images per second of a Ray's actors, once they work."""
        seen: list[tuple[float, int]] = []

        def note(progress: Progress) -> None:
            if progress.done and (not seen or progress.done > seen[-1][1]):
                seen.append((time.perf_counter(), progress.done))

        request = self.request(name)
        plan = make_plan(request)
        pending = begin(plan, open_storage(request.out)) or []
        build_on(cluster, plan, request, pending, note)
        shutil.rmtree(self.folder / name)
        (began, before), (ended, done) = seen[0], seen[-1]
        return (done - before) / (ended - began)


def measure(comparison: Comparison, repeat: int, cluster: Cluster | None) -> None:
    """Prints the medians of so many repetitions, after one preparation that imports what it needs."""
    comparison.here("warm-up")
    rates: dict[str, list[float]] = {}
    for number in range(repeat):
        with one_core():
            rates.setdefault("loop, one core", []).append(comparison.loop(f"one-loop-{number}"))
            rates.setdefault("prepare, one core", []).append(comparison.here(f"one-{number}"))
        rates.setdefault("loop", []).append(comparison.loop(f"loop-{number}"))
        rates.setdefault("prepare", []).append(comparison.here(f"set-{number}"))
        if cluster is not None:
            rates.setdefault("prepare, on Ray", []).append(comparison.on_ray(f"ray-{number}", cluster))
    kind = "latents" if comparison.autoencoder else "pixels"
    print(f"\n## {kind}\n\n{comparison.count} images, medians of {repeat}\n")
    print("| way | images/s | of the loop |\n|---|---|---|")
    for name, values in rates.items():
        loop = "loop, one core" if name.endswith("one core") else "loop"
        ratio = statistics.median(one / other for one, other in zip(values, rates[loop], strict=True))
        print(f"| {name} | {statistics.median(values):.1f} | {ratio:.2f} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, default=SHARED / "data" / "imagenet-sample.zip")
    parser.add_argument("--copies", type=int, default=10, help="how often each image is taken for pixels")
    parser.add_argument("--autoencoder", type=Path, default=SHARED / "models" / "kl-f8-mini")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=("pixels", "latents"), default=("pixels", "latents"))
    parser.add_argument("--without-ray", action="store_true")
    arguments = parser.parse_args()
    for path in (arguments.images, arguments.autoencoder):
        if not path.exists():
            print(f"{path} is not there; name another, or set SOFLOW_TEST_DATA", file=sys.stderr)
            return 2
    # Whatever this machine's speed, the command's own process does all of it.
    prepare_here.LONGEST_SECONDS = 1e9
    prepare_here.RAY_START_SECONDS = 1e9
    folder = Path(tempfile.mkdtemp(prefix="prepare-"))
    try:
        with contextlib.ExitStack() as stack:
            cluster = None if arguments.without_ray else stack.enter_context(connected(None))
            for kind in arguments.kinds:
                copies = arguments.copies if kind == "pixels" else 1
                images, count = repeated(arguments.images, copies, folder / f"{kind}.zip")
                autoencoder = None if kind == "pixels" else str(arguments.autoencoder)
                measure(Comparison(images, count, autoencoder, folder / kind), arguments.repeat, cluster)
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
