"""Real worker processes of one trial, joined by gloo as Ray Train would join them, without Ray."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
import torch.distributed as dist

from soflow_platform.training.job import TrialJob
from soflow_platform.training.worker import Trainer
from tests.support.fork_server import fork_server

Change = Callable[[Trainer], None]
"""What a test does to a worker before it runs; a function of a module, so that it travels."""


def start_ranks(job: TrialJob, world: int, change: Change | None = None) -> list[ForkServerProcess]:
    """Start `world` processes that train the job; each runs `change(worker)` first."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = fork_server()
    ranks = [context.Process(target=_rank, args=(job, rank, world, port, change)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks


def train(job: TrialJob, world: int, change: Change | None = None) -> list[int | None]:
    """Train the job to its end. Returns the exit codes, by rank; ranks that are left waiting for others are killed."""
    ranks = start_ranks(job, world, change)
    deadline = time.monotonic() + 60
    while any(process.exitcode is None for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode not in (0, None) for process in ranks):
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.02)
    codes = [process.exitcode for process in ranks]
    kill(ranks)
    return codes


def kill(ranks: list[ForkServerProcess]) -> None:
    """SIGKILL, all at once."""
    for process in ranks:
        process.kill()
    for process in ranks:
        process.join()


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for something another process does. AssertionError where it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def _rank(job: TrialJob, rank: int, world: int, port: int, change: Change | None) -> None:
    torch.set_num_threads(1)
    if "SOFLOW_SHOW_RANKS" not in os.environ:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    try:
        worker = Trainer.of_job(job, torch.device("cpu"), rank, world)
        if change is not None:
            change(worker)
        worker.run()
    finally:
        dist.destroy_process_group()
