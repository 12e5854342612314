"""The model of soflow_platform.training.step_time against gloo processes on this machine; `scaling.py --check` runs it.

Each worker is a process of one thread with its own rows, the same for all, so that every worker does the same
work. Parts are timed from a barrier to the next one: by the last worker.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from loader import INFO, latents
from soflow_core.gradient_sync import DDP, FSDP, Local
from soflow_core.networks import DiT, DiTConfig, dit_config
from soflow_core.objectives import Batch, SoFlow
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.writer import write_shards
from soflow_platform.training.step_time import BUCKET, FLOAT, SAMPLE_BYTES, fsdp_messages, work_of

SHAPE = (4, 32, 32)
WARM_UP = 2
SAMPLES, READ = 8192, 256
QUIET = 0.5
"""Load below which a machine has little else to do."""
LOOPBACK = Path("/proc/net/dev")


@dataclass(frozen=True)
class Measured:
    """Seconds of the slowest worker."""

    compute: float
    """A step whose gradients stay where they are."""
    exchange: float
    """The all-reduce of as many gradients, in buckets, alone."""
    quarter: float
    """The same of a quarter of them, in one message."""
    step: float
    """The whole: DistributedDataParallel."""
    sent: float | None
    """Bytes that all workers together sent in an exchange; None where the system does not count them."""


def make_step(size: str, distributed: bool) -> TrainStep:
    torch.manual_seed(0)
    network = DiT(network_config(size))
    objective = SoFlow()
    config = TrainStepConfig(total_steps=1000, precision="float32")
    return TrainStep(network, objective, config, DDP() if distributed else Local())


def network_config(size: str) -> DiTConfig:
    return dit_config(size, channels=4, height=32, width=32, classes=1000, null_label=True)


def timed_in_turn(actions: list[Callable[[int], object]], rounds: int) -> list[float]:
    """Median seconds of each action from a barrier until every worker is done, in rounds that go through them in turn."""
    taken: list[list[float]] = [[] for _ in actions]
    for number in range(WARM_UP + rounds):
        for action, times in zip(actions, taken, strict=True):
            dist.barrier()
            start = time.perf_counter()
            action(number)
            dist.barrier()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[WARM_UP:]) for times in taken]


def stepping(train_step: TrainStep, batch: int) -> Callable[[int], object]:
    objective = train_step.objective
    data = Batch(torch.randn(batch, *SHAPE), torch.zeros(batch, dtype=torch.int64))

    def action(number: int) -> object:
        draws = objective.draw(torch.Generator().manual_seed(number), batch, SHAPE, conditional=True)
        return train_step(data, draws)

    return action


def exchanging(elements: int, bucket: int) -> Callable[[int], object]:
    buckets = torch.zeros(elements).split(bucket)

    def action(number: int) -> None:
        del number
        for part in buckets:
            dist.all_reduce(part)

    return action


def sent_bytes() -> int | None:
    """What this machine sent to itself so far."""
    if not LOOPBACK.exists():
        return None
    line = next(line for line in LOOPBACK.read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def work_as_worker(options: argparse.Namespace) -> None:
    """One process; rank 0 prints what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{options.meeting}", rank=options.rank, world_size=options.world
    )
    plain, distributed = (make_step(options.size, flag) for flag in (False, True))
    elements = sum(p.numel() for p in plain.parameters)
    exchange = exchanging(elements, BUCKET // FLOAT)
    before = sent_bytes()
    exchange(0)
    dist.barrier()
    after = sent_bytes()
    parts = (
        stepping(plain, options.batch),
        exchange,
        exchanging(elements // 4, elements),
        stepping(distributed, options.batch),
    )
    sent = None if before is None or after is None else after - before
    measured = [*timed_in_turn(list(parts), options.steps), sent]
    if options.rank == 0:
        print(json.dumps(measured))
    dist.destroy_process_group()


def count_as_worker(options: argparse.Namespace) -> None:
    """One of two processes that share a network; rank 0 prints how often its parts are gathered and scattered in a step."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{options.meeting}", rank=options.rank, world_size=options.world
    )
    torch.manual_seed(0)
    network = DiT(network_config("S/8"))
    parts = len(network.blocks) + 1
    config = TrainStepConfig(total_steps=1000, precision=options.precision)
    train_step = TrainStep(network, SoFlow(), config, FSDP())
    action = stepping(train_step, 8)
    action(0)
    with CommDebugMode() as counted:
        action(1)
    found = {str(name): count for name, count in counted.get_comm_counts().items()}
    gathers = sum(count for name, count in found.items() if "gather" in name)
    scatters = sum(count for name, count in found.items() if "reduce_scatter" in name)
    if options.rank == 0:
        print(json.dumps([gathers / parts, scatters / parts]))
    dist.destroy_process_group()


def spawn(world: int, *arguments: str) -> list[float]:
    """Run workers to their end; what rank 0 printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            *arguments,
            "--meeting",
            f"{folder}/meeting",
            "--world",
            str(world),
        ]
        workers = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                env=environment,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
            )
            for rank in range(world)
        ]
        printed, _ = workers[0].communicate()
        if any(worker.wait() for worker in workers):
            raise SystemExit("a worker failed")
    values: list[float] = json.loads(printed.splitlines()[-1])
    return values


def check_data() -> None:
    """Bytes of a latent in its shards, and how many a second one process reads and draws."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(latents(SAMPLES), Path(folder), INFO, per_shard=SAMPLES // 4)
        stored = sum(path.stat().st_size for path in Path(folder).glob("*.tar")) / SAMPLES
        rates = {}
        for posterior in ("sample", "moments"):
            with ShardLoader(folder, READ, posterior=posterior) as loader:
                next(loader)
                start = time.perf_counter()
                for _ in range(SAMPLES // READ):
                    next(loader)
                rates[posterior] = SAMPLES / (time.perf_counter() - start)
    print(
        f"data: {stored:,.0f} bytes of a latent in its shard (model {SAMPLE_BYTES:,}); one process reads "
        f"{rates['moments']:,.0f} samples/s, {rates['sample']:,.0f} with the posterior drawn on the CPU"
    )


def check_draws(batch: int = 256) -> None:
    """How long one core takes for a batch's noise and times, which every worker draws whole."""
    torch.set_num_threads(1)
    taken = []
    for step in range(10):
        start = time.perf_counter()
        SoFlow().draw(torch.Generator().manual_seed(step), batch, SHAPE, conditional=True)
        taken.append(time.perf_counter() - start)
    seconds = statistics.median(taken)
    print(f"draws: {1e3 * seconds:.1f} ms for {batch} latents, {1e6 * seconds / batch:.0f} microseconds each")


def check(size: str, batch: int, steps: int, counts: list[int]) -> int:
    """Measure and print the model beside it."""
    ((_, work),) = work_of(network_config(size), SoFlow(), "float32")
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    own = ("--size", size, "--batch", str(batch), "--steps", str(steps))
    measured = {count: Measured(*spawn(count, *own)) for count in sorted({1, 2, *counts})}
    # What one worker gets through the loopback where as many run as measured it.
    rate = (work.gradient_bytes / 4) / measured[2].quarter
    print(f"{size}, {batch} samples for each worker, one thread each, {cores} cores")
    if load > QUIET:
        print(f"this machine was busy with other things (load {load:.1f}): times say little")
    print(
        f"{work.gradient_bytes / 1e6:.1f} MB of gradients; two workers exchange {rate / 1e9:.2f} GB/s each\n"
    )
    print(
        "| workers | bytes sent, MB | step alone, s | exchange, s | whole step, s | parts / whole | model / whole |"
    )
    print("|---|---|---|---|---|---|---|")
    for count in sorted(set(counts)):
        found = measured[count]
        busy = max(1.0, count / cores)
        compute = measured[1].compute * busy
        each = 2 * (count - 1) / count * work.gradient_bytes
        exchange = each / rate * busy / max(1.0, 2 / cores)
        # The cores that would hide the exchange carry it out, so nothing is hidden.
        pairs = (
            ("-" if found.sent is None else f"{found.sent / 1e6:.1f}", f"{count * each / 1e6:.1f}"),
            (f"{found.compute:.3f}", f"{compute:.3f}"),
            (f"{found.exchange:.3f}", f"{exchange:.3f}"),
            (f"{found.step:.3f}", f"{compute + exchange:.3f}"),
        )
        cells = [f"{real} (model {model})" for real, model in pairs]
        ratios = [(found.compute + found.exchange) / found.step, (compute + exchange) / found.step]
        print(f"| {count} | {' | '.join(cells)} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    print()
    agree = True
    for precision in ("float32", "mixed"):
        counted = tuple(spawn(2, "--count", "--precision", precision))
        ((_, work),) = work_of(network_config("S/8"), SoFlow(), precision)
        model = fsdp_messages(work)
        # What lies outside the blocks stays gathered from one backward pass to the next.
        agree &= tuple(round(value) for value in counted) == model
        counts_text = " and ".join(f"{value:.2f}" for value in counted)
        print(
            f"FSDP, {precision}: the network is gathered and scattered {counts_text} times in a step (model {model})"
        )
    check_data()
    check_draws()
    return 0 if agree else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="S/4")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--meeting", required=True)
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    count_as_worker(options) if options.count else work_as_worker(options)


if __name__ == "__main__":
    main()
