"""What a checkpoint costs: the stall of training, the seconds of saving and of loading, beside a plain copy of the same bytes.

    python benchmarks/checkpoints.py                              # a state of 20 M parameters, in a temporary folder
    python benchmarks/checkpoints.py --parameters 676440000       # the size of XL/2; needs 22 GiB of memory
    python benchmarks/checkpoints.py --parameters 676440000 --no-source
    python benchmarks/checkpoints.py --to 's3://bucket/prefix?endpoint_override=HOST:PORT&scheme=http'

The state is simulated: tensors of 4 M float32 numbers, four of each (parameter, two moments of Adam, one average). `start` is what
stops training at once: starting the copy to host memory, and the thread that writes from it. `copy` is that copy, which the update of
the next step waits for: a step whose gradients take longer is not stopped by it. `pause` is the longest that Python stands still in
another thread meanwhile, beyond what it does at rest: what training would notice of locks. `CPU s` is the work of all of the
process's threads, which a training loses that leaves no core free. `save` ends when the checkpoint is
published; `load` verifies every checksum, looks for values that are not finite and copies the state to its place. `one file` is the
same state in torch's own format, in one file, hashed once it is written. Files are dropped from the page cache before they are read,
where the system does that. With `--no-source` the state exists once, and what is saved is not a copy: none is measured then.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soflow_core.host_copy import HostCopy, PendingCopy, map_tensors
from soflow_core.weights import is_finite
from soflow_pipelines.storage.files import sha256
from soflow_platform.storage.checkpoints import CheckpointState, CheckpointStore
from soflow_platform.training.checkpointer import AsyncCheckpointer
from soflow_platform.training.state_files import TensorFile, opened_state, write_state

TENSOR = 2**22
"""Numbers of a tensor: DiT-XL/2's largest are 2 to 8 M."""
CPU = ", CPU"
"""Behind the name of what is measured: seconds of the processors."""
BLOCK = 2**23
STALL_SHARE = 0.01
"""Bar: what stops training, at most start and copy, over the seconds between two checkpoints."""


def simulated_state(parameters: int) -> dict[str, Any]:
    """A state with the structure of TrainStep's, of `parameters` trained numbers."""
    sizes = [TENSOR] * (parameters // TENSOR) + [parameters % TENSOR] * (parameters % TENSOR > 0)
    filled = iter(range(1, 4 * len(sizes) + 1))

    def tensors() -> list[Tensor]:
        return [torch.full((size,), 1 / next(filled)) for size in sizes]

    names = [f"blocks.{number}.weight" for number in range(len(sizes))]
    moments = zip(tensors(), tensors(), strict=True)
    return {
        "step": 1,
        "total_steps": 10,
        "network": dict(zip(names, tensors(), strict=True)),
        "optimizer": {
            "state": {
                number: {"step": torch.tensor(1.0), "exp_avg": first, "exp_avg_sq": second}
                for number, (first, second) in enumerate(moments)
            },
            "param_groups": [{"lr": 1e-4, "params": list(range(len(sizes)))}],
        },
        "ema": {"0.9999": dict(zip(names, tensors(), strict=True))},
    }


def averages(state: dict[str, Any]) -> TensorFile:
    return TensorFile({**state["network"], **state["ema"]["0.9999"]}, {})


def drop_from_cache(folder: Path) -> None:
    """Have the system forget the content of files, which are on the disk, as far as it does."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def plain_copy(state: dict[str, Any], folder: Path) -> dict[str, float]:
    """Seconds to write and to read the tensors' bytes, one file, one thread, no checksum."""
    path, started, worked = folder / "plain", time.perf_counter(), time.process_time()

    def write(tensor: Tensor) -> None:
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        for begin in range(0, len(view), BLOCK):
            file.write(view[begin : begin + BLOCK])

    with path.open("wb") as file:
        map_tensors(state, write)
        file.flush()
        os.fsync(file.fileno())
    taken = {
        "plain write": time.perf_counter() - started,
        f"plain write{CPU}": time.process_time() - worked,
    }
    drop_from_cache(folder)
    started, buffer = time.perf_counter(), bytearray(BLOCK)
    with path.open("rb", buffering=0) as source:
        while source.readinto(buffer):
            pass
    taken["plain read"] = time.perf_counter() - started
    path.unlink()
    return taken


def one_file(state: dict[str, Any], folder: Path) -> dict[str, float]:
    """Seconds to write the state in torch's format and to hash it."""
    path, started, worked = folder / "state.pt", time.perf_counter(), time.process_time()
    torch.save(state, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    sha256(path)
    taken = {"one file": time.perf_counter() - started, f"one file{CPU}": time.process_time() - worked}
    path.unlink()
    return taken


class Pauses:
    """The longest time between two turns of a loop in a thread of its own."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop)

    def _loop(self) -> None:
        last = time.perf_counter()
        while not self._end.is_set():
            time.sleep(1e-3)
            now = time.perf_counter()
            self.longest, last = max(self.longest, now - last), now

    def __enter__(self) -> Pauses:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def save(
    saver: AsyncCheckpointer, number: int, state: dict[str, Any], copy: HostCopy | None
) -> dict[str, float]:
    """Seconds of one checkpoint; `start` and `copy` where it is made from a copy."""

    def write(folder: Path) -> dict[str, str]:
        taken = pending.wait()
        return write_state(folder, taken, averages(taken))

    started, worked = time.perf_counter(), time.process_time()
    assert saver.ready(number, needed=True)
    pending = PendingCopy(state) if copy is None else copy.start(state)
    saver.submit(CheckpointState(number, 0, "run"), [], write)
    start = time.perf_counter() - started
    with Pauses() as pauses:
        pending.hold()
        copied = time.perf_counter() - started
        saver.drain()
    taken = {
        "save": time.perf_counter() - started,
        f"save{CPU}": time.process_time() - worked,
        "pause": pauses.longest,
    }
    return taken if copy is None else {**taken, "start": start, "copy": copied}


def load(store: CheckpointStore, place: dict[str, Any]) -> float:
    """Seconds to verify the newest checkpoint and to copy its state to its place."""
    started = time.perf_counter()
    checkpoint, damaged = store.newest(keep=True)
    assert checkpoint is not None
    assert not damaged
    with opened_state(checkpoint) as state:
        pairs: list[Tensor] = []
        map_tensors(state, pairs.append)
        targets: list[Tensor] = []
        map_tensors(place, targets.append)
        assert all(is_finite(tensor) for tensor in pairs)
        for target, tensor in zip(targets, pairs, strict=True):
            target.copy_(tensor)
    return time.perf_counter() - started


@contextlib.contextmanager
def storage(named: str | None) -> Iterator[tuple[str, Path | None]]:
    """The root of the checkpoints, and the folder that it is, where it is one."""
    if named is not None and "://" in named:
        yield named, None
        return
    with tempfile.TemporaryDirectory(dir=named) as folder:
        yield str(Path(folder) / "checkpoints"), Path(folder)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each part, the median of the rounds."""
    state, copy = simulated_state(options.parameters), None if options.no_source else HostCopy()
    taken: dict[str, list[float]] = {}
    with storage(options.to) as (root, folder):
        store = CheckpointStore(root)
        saver = AsyncCheckpointer(store, keep=1, patience=0, log=lambda _: None)
        with Pauses() as rest:
            time.sleep(0.5)
        for number in range(options.rounds + 1):
            found: dict[str, float] = {}
            if folder is not None:
                found |= plain_copy(state, folder) | one_file(state, folder)
            found |= save(saver, number + 1, state, copy)
            found["pause"] = max(0.0, found["pause"] - rest.longest)
            if folder is not None:
                drop_from_cache(folder)
            found["load"] = load(store, state)
            # The first round takes memory and makes folders.
            if number or not options.rounds:
                for name, seconds in found.items():
                    taken.setdefault(name, []).append(seconds)
        saver.close()
        for checkpoint in store.published():
            for file in checkpoint.files:
                checkpoint.storage.remove(f"{checkpoint.name}/{file}")
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=20_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="beside a first one; 0: only the first")
    parser.add_argument("--no-source", action="store_true", help="save the state itself, not a copy of it")
    parser.add_argument("--to", metavar="FOLDER_OR_URI", help="where to; by default a temporary folder")
    options = parser.parse_args()
    seconds = measure(options)
    size = 16 * options.parameters
    print(f"state of {options.parameters / 1e6:g} M parameters, {size / 1e9:.2f} GB\n")
    print("| | s | GB/s | CPU s |\n|---|---|---|---|")
    for name in ("plain write", "one file", "save", "plain read", "load", "copy"):
        if name in seconds:
            worked = f"{seconds[name + CPU]:.2f}" if name + CPU in seconds else ""
            print(f"| {name} | {seconds[name]:.3f} | {size / seconds[name] / 1e9:.2f} | {worked} |")
    print(f"\nlongest pause of Python while the threads write: {seconds['pause']:.3f} s")
    if "plain write" in seconds:
        print(f"save / plain write = {seconds['save'] / seconds['plain write']:.2f}")
        print(f"save / one file = {seconds['save'] / seconds['one file']:.2f}")
        print(f"load / plain read = {seconds['load'] / seconds['plain read']:.2f}")
    if "copy" in seconds:
        print(f"starting a save: {seconds['start']:.4f} s")
        print(
            f"start and copy are {100 * STALL_SHARE:g}% of the time between checkpoints that are {seconds['copy'] / STALL_SHARE:.0f} s "
            "apart"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
