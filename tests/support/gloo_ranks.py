"""Runs a function in several processes joined by gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from soflow_core.objectives import Batch, Draws
from tests.support.fork_server import fork_server

WORLD = 2


def run_ranks(function: Callable[..., None], *arguments: object) -> None:
    """Runs `function(rank, *arguments)` in WORLD processes, which must all succeed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    fork_server()
    mp.start_processes(_joined, (port, function, arguments), nprocs=WORLD, start_method="forkserver")


def rank_rows(inputs: tuple[Batch, Draws], rank: int) -> tuple[Batch, Draws]:
    """A rank's rows of the global batch, of which the rank has no other."""
    batch, draws = inputs
    return replace(batch.rows(rank, WORLD), whole=None), draws.rows(rank, WORLD)


def _joined(rank: int, port: int, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    function(rank, *arguments)
    dist.destroy_process_group()
