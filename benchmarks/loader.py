"""Samples per second of the loader against plain WebDataset, h5py and numpy's memmap, in one run on the same
latents.

python benchmarks/loader.py [--samples 20000] [--folder DIR]

Each reader gives batches of 256 of shape (8, 32, 32). The bars: at least 20 times h5py read one sample at a
time as float32, at least a third of a memmap's random gather, and memory that does not grow with the number
of shards. Exit code 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import h5py
import numpy as np
import torch
import webdataset

from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.tables import read_manifest
from soflow_pipelines.shards.writer import Sample, write_shards

SHAPE = (8, 32, 32)
BATCH = 256
ROUNDS = 5
MEMORY_BATCHES = 78
CHUNKED = 2048  # samples kept in h5py's own chunks, which are slow to read
OPENED_EACH = "h5py, opened for each sample"
INFO = DatasetInfo(kind="latents", shape=(4, 32, 32), dtype="float16", classes=1000, scaling=0.18215)

Batches = Iterator[tuple[torch.Tensor, object]]


def latents(count: int) -> Iterator[Sample]:
    rng = np.random.default_rng(0)
    for number in range(count):
        yield Sample(
            f"{number:08d}", rng.standard_normal(SHAPE, np.float32).astype(np.float16), number % 1000
        )


def write_all(folder: Path, count: int) -> None:
    """The same latents in every format."""
    for shards in (10, 1000):
        write_shards(latents(count), folder / f"shards-{shards}", INFO, per_shard=-(-count // shards))
    mapped = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, (count, *SHAPE))
    with h5py.File(folder / "latents.h5", "w") as file:
        stored = file.create_dataset("latents", (count, *SHAPE), np.float32)
        appended = file.create_dataset("appended", (0, *SHAPE), np.float32, maxshape=(None, *SHAPE))
        appended.resize(min(count, CHUNKED), axis=0)
        labels = file.create_dataset("labels", (count,), np.int64)
        for number, sample in enumerate(latents(count)):
            mapped[number] = sample.array
            stored[number] = sample.array
            labels[number] = sample.label
        for start in range(0, len(appended), BATCH):
            appended[start : start + BATCH] = stored[start : min(start + BATCH, len(appended))]
    mapped.flush()


def ours(folder: Path, **options: object) -> Batches:
    with ShardLoader(folder, BATCH, **options) as loader:  # type: ignore[arg-type]
        for batch in loader:
            yield batch.x0, batch.labels


def plain_webdataset(folder: Path) -> Batches:
    urls = [str(folder / record.name) for record in read_manifest(folder)]
    while True:
        reader = (
            webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("npy", "cls").batched(BATCH)
        )
        for arrays, labels in reader:
            yield torch.from_numpy(np.asarray(arrays)).float(), labels


def h5py_by_sample(path: Path, name: str, open_each: bool) -> Batches:
    """One sample at a time, float32, in random order, then stacked; the file opened once or for each
    sample.
    """
    with h5py.File(path) as kept:
        count = len(kept[name])
        while True:
            order = np.random.default_rng(0).permutation(count)
            for start in range(0, count - BATCH + 1, BATCH):
                samples = []
                for number in order[start : start + BATCH]:
                    with h5py.File(path) if open_each else nullcontext(kept) as file:
                        samples.append((torch.from_numpy(file[name][number]), file["labels"][number]))
                yield torch.stack([sample for sample, _ in samples]), [label for _, label in samples]


def memmap_gather(path: Path, ready: bool) -> Batches:
    mapped = np.load(path, mmap_mode="r")
    while True:
        order = np.random.default_rng(0).permutation(len(mapped))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            gathered = torch.from_numpy(mapped[order[start : start + BATCH]])
            yield (gathered.float() if ready else gathered), None


def rate(batches: Batches, count: int) -> float:
    """Samples per second over `count` batches."""
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - started)


def measure(readers: dict[str, tuple[Batches, int]]) -> dict[str, float]:
    """The median rate of each, taken in turns so that a slow moment of the machine hits all of them."""
    for batches, count in readers.values():
        rate(batches, count)
    rounds = [{name: rate(*reader) for name, reader in readers.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(taken[name] for taken in rounds) for name in readers}


def anonymous_megabytes() -> float:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def print_memory(folder: Path) -> None:
    """Run in a process of its own: what the loader adds to a process that has loaded the libraries."""
    before = anonymous_megabytes()
    batches = ours(folder, threads=1)
    for _ in range(MEMORY_BATCHES):
        next(batches)
    print(json.dumps(anonymous_megabytes() - before))


def memory(folder: Path) -> float:
    """The least of three runs: what the allocator keeps beyond what is needed varies by tens of megabytes."""
    command = [sys.executable, __file__, "--memory-of", str(folder)]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)]
    return min(float(json.loads(run)) for run in runs)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="for the files, 1.7 GB; default a temporary one")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of is not None:
        print_memory(arguments.memory_of)
        return 0
    folder = Path(tempfile.mkdtemp(prefix="loader-", dir=arguments.folder))
    try:
        return compare(folder, arguments.samples)
    finally:
        shutil.rmtree(folder)


def compare(folder: Path, samples: int) -> int:
    print(f"writing {samples} latents of shape {SHAPE} in four formats")
    write_all(folder, samples)
    few, many, epoch = folder / "shards-10", folder / "shards-1000", samples // BATCH
    readers = {
        "loader, moments": (ours(few, posterior="moments", threads=0), epoch),
        "loader, moments, a thread": (ours(few, posterior="moments", threads=1), epoch),
        "loader, moments, 1,000 shards": (ours(many, posterior="moments", threads=0), epoch),
        "loader, fresh posterior sample": (ours(few, threads=0), epoch // 4),
        "loader, fresh sample, two threads": (ours(few, threads=2), epoch // 4),
        "webdataset, decode and batch": (plain_webdataset(few), epoch // 4),
        OPENED_EACH: (h5py_by_sample(folder / "latents.h5", "latents", True), max(1, epoch // 30)),
        "h5py, kept open": (h5py_by_sample(folder / "latents.h5", "latents", False), max(1, epoch // 8)),
        "h5py, kept open, appendable": (h5py_by_sample(folder / "latents.h5", "appended", False), 1),
        "memmap gather, float16": (memmap_gather(folder / "latents.npy", False), epoch),
        "memmap gather, float32": (memmap_gather(folder / "latents.npy", True), epoch),
    }
    first = rate(ours(few, posterior="moments", threads=0), epoch)
    rates = measure(readers)
    slow, limit = rates[OPENED_EACH], rates["memmap gather, float16"]
    print(f"{'samples/s':>44}   x h5py   / memmap")
    for name, value in {**rates, "loader, moments, first epoch (checked)": first}.items():
        print(f"{name:>34} {value:9.0f}   {value / slow:6.1f}   {value / limit:8.2f}")
    grown = {shards: memory(folder / f"shards-{shards}") for shards in (10, 1000)}
    print("memory the loader adds: " + ", ".join(f"{mb:.0f} MB with {n} shards" for n, mb in grown.items()))
    return exit_code(rates["loader, moments"], slow, limit, grown)


def exit_code(loader: float, slow: float, limit: float, grown: dict[int, float]) -> int:
    bars = {
        f"at least 20 times h5py: {loader / slow:.1f}": loader >= 20 * slow,
        f"at least a third of the memmap: {loader / limit:.2f}": 3 * loader >= limit,
        f"no more memory with 1,000 shards: {grown[1000] - grown[10]:+.0f} MB": grown[1000] <= grown[10] + 20,
    }
    for bar, met in bars.items():
        print(f"{'met   ' if met else 'MISSED'} {bar}")
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
