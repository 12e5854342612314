"""How long a copy of a training's state in host memory, and a whole save, stop the training, beside a step of it.

    python benchmarks/host_copy.py --size S/4
    python benchmarks/host_copy.py --size XL/2 --device cuda --batch 64

`anew` takes memory for every copy, `again` writes over the copy before. On a GPU that memory is pinned. A `save` is what stops a
trial's first worker: looking whether the last checkpoint is written, starting the copy and the thread that writes from it, and
waiting, before the update of the next step, until the copy is complete. Exit code 1 where that is more than a step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from soflow_core.host_copy import HostCopy, PendingCopy, map_tensors
from soflow_core.networks import DiT, dit_config
from soflow_core.objectives import Batch, SoFlow
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_platform.storage.checkpoints import CheckpointState, CheckpointStore
from soflow_platform.training.checkpointer import AsyncCheckpointer
from soflow_platform.training.state_files import TensorFile, write_state


def median_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Of `rounds` runs by the wall clock, after one that is not counted."""
    taken = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def save_seconds(train: TrainStep, rounds: int, step: Callable[[], object]) -> float:
    """A save as training waits for it, the median of `rounds`, the checkpoint before being written."""
    copy, saves = HostCopy(), []
    with tempfile.TemporaryDirectory() as folder:
        saver = AsyncCheckpointer(CheckpointStore(folder), keep=1, patience=0, log=lambda _: None)
        for number in range(rounds + 1):
            saver.drain()
            start = time.perf_counter()
            assert saver.ready(number, needed=False)
            pending = train.start_host_state(copy)

            def write(place: Path, pending: PendingCopy = pending) -> dict[str, str]:
                state = pending.wait()
                average = {**state["network"], **next(iter(state["ema"].values()))}
                return write_state(place, state, TensorFile(average, {}))

            saver.submit(CheckpointState(number, 0, "run"), [], write)
            stopped = time.perf_counter() - start
            step()
            saves.append(stopped + pending.held)
        saver.close()
    return statistics.median(saves[1:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="S/4")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device, objective = torch.device(options.device), SoFlow()
    config = dit_config(options.size, channels=4, height=32, width=32, classes=1000, null_label=True)
    train = TrainStep(DiT(config).to(device), objective, TrainStepConfig(total_steps=1000))
    batch = Batch(torch.randn(options.batch, 4, 32, 32), torch.randint(1000, (options.batch,)))

    def step() -> None:
        assert train(batch, objective.draw(None, options.batch, (4, 32, 32), conditional=True)).finite

    copy, sizes = HostCopy(), []
    seconds = {
        "a step": median_seconds(step, device, options.rounds),
        "anew": median_seconds(train.host_state, device, options.rounds),
        "again": median_seconds(lambda: train.host_state(copy), device, options.rounds),
    }
    seconds["a save"] = save_seconds(train, options.rounds, step)
    map_tensors(train.state_dict(), lambda tensor: sizes.append(tensor.nbytes))
    print(f"{options.size}, state of {sum(sizes) / 2**30:.2f} GiB, step of batch {options.batch}, {device}")
    print("| | s | of a step |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.3f} | {value / seconds['a step']:.3f} |")
    print(f"again / anew = {seconds['again'] / seconds['anew']:.3f}")
    kept = seconds["a save"] <= seconds["a step"]
    if not kept:
        print("MISSED a save stops training for more than a step")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
