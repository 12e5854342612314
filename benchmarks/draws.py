"""Host work of a training image under both versions of the draws, and what loading costs a step of a fast host.

python benchmarks/draws.py [--rate 50000] [--batch 1024] [--ranks 8] [--steps 60]

The data are latents of shape (4, 32, 32) in float16 with mean and deviation. `generator` reads them and draws posterior samples,
noise and times on the CPU; `counter` hands the stored rows over, and the rest is the device's. Host work is CPU seconds of all threads
by image. A step of one of the host's ranks, which has its share of the rows, is simulated by a wait of batch / rate seconds, as it
waits for its GPU, in turn with and without the loader of `counter`; the limit is 2%. Exit code 1 where it is missed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from soflow_core.objectives import SoFlow
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.loader import Posterior, ShardLoader
from soflow_pipelines.shards.writer import Sample, write_shards

SHAPE = (4, 32, 32)
INFO = DatasetInfo(kind="latents", shape=SHAPE, dtype="float16", classes=1000, scaling=0.18215)
SAMPLES = 8192
LIMIT = 0.02
ROUNDS = 5


def latents() -> Iterator[Sample]:
    rng = np.random.default_rng(0)
    for number in range(SAMPLES):
        moments = rng.standard_normal(INFO.stored_shape, np.float32).astype(np.float16)
        yield Sample(f"{number:08d}", moments, number % 1000)


def cpu_of_an_image(work: Callable[[], object], images: int) -> float:
    """Median CPU microseconds of this process by image."""
    taken = []
    for _ in range(ROUNDS):
        before = time.process_time()
        work()
        taken.append((time.process_time() - before) / images * 1e6)
    return statistics.median(taken)


def loading(folder: Path, posterior: Posterior, batch: int) -> float:
    """CPU microseconds of an image, once every checksum has been compared."""
    with ShardLoader(folder, batch, threads=0, posterior=posterior) as loader:
        for _ in range(-(-SAMPLES // batch)):
            next(loader)
        return cpu_of_an_image(lambda: next(loader), batch)


def step_seconds(steps: int, wait: float, rows: Callable[[], object]) -> float:
    """Median seconds of so many simulated steps."""
    taken = []
    for _ in range(steps):
        started = time.perf_counter()
        rows()
        time.sleep(wait)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rate", type=float, default=50_000.0, help="images that a host trains on in a second"
    )
    parser.add_argument("--batch", type=int, default=1024, help="rows of a step, of all ranks")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=8, help="processes that train on the host")
    arguments = parser.parse_args()
    batch, wait = arguments.batch, arguments.batch / arguments.rate
    folder = Path(tempfile.mkdtemp(prefix="draws-"))
    torch.set_num_threads(1)
    try:
        write_shards(latents(), folder / "set", INFO, total=SAMPLES)
        generator, objective = torch.Generator().manual_seed(0), SoFlow()
        drawing = cpu_of_an_image(lambda: objective.draw(generator, batch, SHAPE, True), batch)
        host = {
            "generator": loading(folder / "set", "sample", batch) + drawing,
            "counter": loading(folder / "set", "stored", batch),
        }
        for name, microseconds in host.items():
            cores = microseconds * arguments.rate / 1e6
            print(
                f"{name:>10} {microseconds:6.1f} us of a core an image, {cores:5.2f} cores at {arguments.rate:,.0f} images/s"
            )
        with ShardLoader(folder / "set", batch, 0, arguments.ranks, posterior="stored") as loader:
            step_seconds(-(-SAMPLES // batch) + 1, 0.0, lambda: next(loader))
            costs = []
            for _ in range(ROUNDS):
                alone = step_seconds(arguments.steps, wait, lambda: None)
                costs.append(step_seconds(arguments.steps, wait, lambda: next(loader)) / alone - 1)
    finally:
        shutil.rmtree(folder)
    cost = statistics.median(costs)
    verdict = "holds" if cost <= LIMIT else "MISSED"
    print(
        f"a step of {1000 * wait:.1f} ms takes {cost:.1%} longer with its rows loaded, limit {LIMIT:.0%}: {verdict}"
    )
    return 0 if cost <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
