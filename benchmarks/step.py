"""Seconds and peak memory of one training step of each method, beside the plain step of the same network.

    python benchmarks/step.py --sizes S/4 B/4 --batch 16 --threads 2
    python benchmarks/step.py --sizes digits --batch 128 --threads 1
    python benchmarks/step.py --device cuda --sizes B/2 XL/2 --batch 64 --precision mixed --compile

All rows share one network, one optimizer and one batch; the rounds go through the rows in turn, and a row's
time is the median of its rounds. `plain` is forward, squared error, backward and update, without EMA. `F` is
the measured number of multiply-adds over those of one forward pass of the batch (the plain step is 3).

Peak memory on a GPU is the most that is allocated during the timed steps, with weights, moments and EMA, which
all rows share. On a CPU it is that of a process that does two steps of the row alone; under --compile the
compiler's own is in it. Under --compile `meanflow` is compiled but for its Jacobian-vector product, which is
not in any way, and `meanflow eager` runs as it is written.

Model FLOPs utilization is the multiply-adds of F, twice, by the second, over the device's dense bfloat16 peak:
of a whole step with update and EMA, and of `bf16 passes`, which are those of SoFlow that bfloat16 does not
harm, by themselves and for every row of the batch: guidance, then forward and backward of Flow Matching.

A measurement that fails, as for want of memory, is a dash, and its reason goes to stderr.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from soflow_core.guidance import VelocityGuidance
from soflow_core.kernels import step_kernels
from soflow_core.networks import DiT, DiTConfig, dit_config
from soflow_core.objectives import Batch, FlowMatching, Loss, MeanFlow, Objective, SoFlow
from soflow_core.objectives.base import DEFAULT_POLICY
from soflow_core.passes import PassPolicy
from soflow_core.train_step import MOST_GRAPHS, TrainStep, TrainStepConfig
from soflow_six_calls import six_call_loss

MeasuredT = TypeVar("MeasuredT")

STEPS = ["plain", "flow matching", "soflow", "in pieces", "six calls", "meanflow"]
UNCOMPILED = "meanflow eager"
HALF = "bf16 passes"
PIECES = 4
"""Of the row `in pieces`, which is SoFlow."""
# MeanFlow guided as SoFlow's default is: omega = m w, kappa = 1 - m, up to tau.
MATCHED = VelocityGuidance(omega=0.75, kappa=0.75, end=0.8)
TOTAL_STEPS = 1000
COUNTED = 16
"""Rows whose multiply-adds are counted at most: in eager float32 a large batch would not fit."""
DIGITS = DiTConfig(1, 8, 8, patch=2, hidden=96, depth=4, heads=4, classes=10, null_label=True)
"""Of sweeps/digits.yaml, as the size `digits`."""
# Numerator, denominator, largest ratio.
BARS = (("soflow", "six calls", 0.95), ("soflow", "plain", 1.55), ("soflow", "meanflow", 1.0))
MEMORY_BAR = ("soflow", "meanflow", 1.0)
# Dense bfloat16 peak in FLOP/s, by a word of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


class SixCalls(SoFlow):
    """SoFlow with its loss in six calls."""

    def loss(self, network, batch, draws, step, total_steps, policy=DEFAULT_POLICY):
        return Loss(six_call_loss(self, network, batch, draws, step, total_steps, policy), {})


OBJECTIVES: dict[str, Objective] = {
    "flow matching": FlowMatching(),
    "soflow": SoFlow(),
    "in pieces": SoFlow(),
    "six calls": SixCalls(),
    "meanflow": MeanFlow(guidance=MATCHED),
    UNCOMPILED: MeanFlow(guidance=MATCHED),
    HALF: SoFlow(flow_matching_share=1.0),
}


@dataclass
class Bench:
    """A network of a size on a device, and one step of each row on it."""

    size: str
    batch_size: int
    device: torch.device
    precision: str
    compile: bool

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        if self.compile:
            # Rows beside the training step compile versions of their own.
            torch._dynamo.config.recompile_limit = MOST_GRAPHS
        config = (
            DIGITS
            if self.size == "digits"
            else dit_config(self.size, channels=4, height=32, width=32, classes=1000, null_label=True)
        )
        self.shape = config.sample_shape
        network = DiT(config).to(self.device)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        self.step = TrainStep(
            network,
            SoFlow(),
            TrainStepConfig(TOTAL_STEPS, precision=self.precision, compile=self.compile),
        )
        self.generator = torch.Generator().manual_seed(0)
        self.batch = Batch(
            torch.randn(self.batch_size, *self.shape, generator=self.generator),
            torch.randint(config.classes, (self.batch_size,), generator=self.generator),
        )

    @property
    def rows(self) -> list[str]:
        uncompiled = [UNCOMPILED] if self.compile else []
        return STEPS + uncompiled + ([HALF] if self.precision != "float32" else [])

    def make(self, row: str) -> Callable[[], None]:
        """One step of this row, with new draws each time."""
        if row == "plain":
            return self.plain
        if row == HALF:
            return self.half
        objective = OBJECTIVES[row]

        def step() -> None:
            self.step.objective = objective
            pieces = PIECES if row == "in pieces" else 1
            self.step.config = replace(self.step.config, accumulate=pieces)
            draws = objective.draw(self.generator, self.batch_size, self.shape, conditional=True)
            with eager() if row == UNCOMPILED else nullcontext():
                record = self.step(self.batch, draws)
            if not record.finite:
                raise RuntimeError(f"the step is not finite: {record.culprit}")

        return step

    def plain(self) -> None:
        batch, network = self.batch.to(self.device), self.step.module
        t = torch.rand(self.batch_size, device=self.device)
        half = self.precision != "float32"
        with step_kernels(self.device, tf32_allowed=half, deterministic=False):
            self.step.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
                prediction = network(batch.x0, t, t, batch.labels)
            (prediction.float() - batch.x0).square().mean().backward()
            self.step.optimizer.step()

    def half(self) -> None:
        """The passes that `mixed` runs in bfloat16, without an update."""
        objective, batch = OBJECTIVES[HALF], self.batch.to(self.device)
        draws = objective.draw(self.generator, self.batch_size, self.shape, conditional=True).to(self.device)
        with step_kernels(self.device, tf32_allowed=True, deterministic=False):
            self.step.optimizer.zero_grad(set_to_none=True)
            policy = self.step.policy
            objective.loss(self.step.module, batch, draws, 0, TOTAL_STEPS, policy).loss.backward()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, step: Callable[[], None], clock: Callable[[], float]) -> tuple[float, float]:
        """Seconds of a step, and on a GPU the GiB allocated at its peak."""
        gpu = self.device.type == "cuda"
        self.wait()
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = clock()
        step()
        self.wait()
        seconds = clock() - start
        return seconds, torch.cuda.max_memory_allocated(self.device) / 2**30 if gpu else 0.0

    def flops(self, row: str) -> float:
        """Of a step of this row for one row of the batch, or of one forward pass, in eager float32 with the
        mathematical attention.
        """
        count = min(self.batch_size, COUNTED)
        batch = Batch(self.batch.x0[:count], self.batch.labels[:count]).to(self.device)
        network, policy = self.step.module, PassPolicy(skip_unused=self.step.policy.skip_unused)
        t = torch.full((count,), 0.5, device=self.device)
        self.step.optimizer.zero_grad(set_to_none=True)
        with sdpa_kernel(SDPBackend.MATH), eager(), FlopCounterMode(display=False) as counter:
            if row == "forward":
                with torch.no_grad():
                    network(batch.x0, t, t, batch.labels)
            elif row == "plain":
                network(batch.x0, t, t, batch.labels).square().mean().backward()
            else:
                objective = OBJECTIVES[row]
                draws = objective.draw(self.generator, count, self.shape, conditional=True).to(self.device)
                objective.loss(network, batch, draws, 0, TOTAL_STEPS, policy).loss.backward()
        return counter.get_total_flops() / count

    def forwards(self, row: str) -> float:
        """Multiply-adds of a step over those of one forward pass, mean of two draws."""
        return (self.flops(row) + self.flops(row)) / 2 / self.flops("forward")


def eager() -> AbstractContextManager[None]:
    """Inside, compiled blocks run as they were written."""
    return torch.compiler.set_stance("force_eager")


def attempt(what: str, measure: Callable[[], MeasuredT]) -> MeasuredT | None:
    """What is measured, or None and a line on stderr where it fails."""
    try:
        return measure()
    except (RuntimeError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        print(f"{what}: {(reason or [repr(error)])[-1]}", file=sys.stderr)
    # The error held the tensors of what failed.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def times(bench: Bench, rounds: int, clock: Callable[[], float]) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and peak GiB of each row that runs, over rounds that go through the rows in turn.

    One more round at first, in which memory is taken and compilers work, does not count.
    """
    steps = {row: bench.make(row) for row in bench.rows}
    taken: dict[str, list[tuple[float, float]]] = {row: [] for row in steps}
    for _ in range(rounds + 1):
        for row in list(steps):
            measured = attempt(f"{bench.size} {row}", partial(bench.time, steps[row], clock))
            if measured is None:
                bench.step.optimizer.zero_grad(set_to_none=True)
                del steps[row]
            else:
                taken[row].append(measured)
    counted = {row: list(zip(*taken[row][1:], strict=True)) for row in steps}
    seconds = {row: statistics.median(parts[0]) for row, parts in counted.items()}
    return seconds, {row: max(parts[1]) for row, parts in counted.items()}


def process_memory(options: argparse.Namespace, size: str, row: str) -> float:
    """GiB of a process on the CPU that does two steps of this row alone."""
    settings = {
        "child": row,
        "sizes": size,
        "batch": options.batch,
        "precision": options.precision,
        "threads": options.threads,
    }
    command = [sys.executable, str(Path(__file__))]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    command += ["--compile"] if options.compile else []
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(result.stdout.splitlines()[-1])["peak"])


def child(bench: Bench, row: str) -> None:
    step = bench.make(row)
    step()
    step()
    # The high-water mark of this address space; getrusage would count the parent's from before the exec.
    status = Path("/proc/self/status").read_text().split()
    peak = 1024 * int(status[status.index("VmHWM:") + 1])
    print(json.dumps({"peak": peak / 2**30}))


def text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def bar_holds(values: dict[str, float], top: str, bottom: str, bar: float, of: str) -> bool:
    """Prints whether a ratio of two rows is within its bar, which one that was not measured is not."""
    if top not in values or bottom not in values:
        print(f"{of} of {top} / {bottom}: not measured, bar {bar}")
        return False
    ratio = values[top] / values[bottom]
    print(f"{of} of {top} / {bottom} = {ratio:.3f}, bar {bar}: {'holds' if ratio <= bar else 'MISSED'}")
    return ratio <= bar


def utilization(bench: Bench, peak: float, seconds: dict[str, float], forwards: dict[str, float]) -> None:
    """Prints model FLOPs utilization of whole steps and of the bfloat16 passes."""
    forward = attempt("forward pass", partial(bench.flops, "forward"))
    for row in ("plain", "soflow", HALF):
        if forward is not None and row in seconds and row in forwards:
            used = forwards[row] * forward * bench.batch_size / seconds[row] / peak
            print(f"model FLOPs utilization of {row}: {100 * used:.1f}% of {peak / 1e12:g} TFLOP/s")


def report(options: argparse.Namespace, size: str) -> bool:
    """Prints the table of one size and its bars; True where every bar holds."""
    device = torch.device(options.device)
    bench = Bench(size, options.batch, device, options.precision, options.compile)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds, memory = times(bench, options.rounds, clock)
    counted = {row: attempt(f"F of {row}", partial(bench.forwards, row)) for row in bench.rows}
    forwards = {row: value for row, value in counted.items() if value is not None}
    if options.no_memory:
        memory = {}
    elif device.type == "cpu":
        peaks = {r: attempt(f"memory of {r}", partial(process_memory, options, size, r)) for r in bench.rows}
        memory = {row: value for row, value in peaks.items() if value is not None}
    how = "compiled" if options.compile else "eager"
    print(
        f"\n{size}, batch {options.batch}, {options.device}, {options.precision}, {how},"
        f" {torch.get_num_threads()} threads, {options.clock} clock"
    )
    print(f"| step | s | of plain | F | peak GiB, {how} |\n|---|---|---|---|---|")
    for row in bench.rows:
        taken, plain = seconds.get(row), seconds.get("plain")
        ratio = None if taken is None or plain is None else taken / plain
        cells = text(taken, 3), text(ratio, 3), text(forwards.get(row), 2), text(memory.get(row), 2)
        print(f"| {row} | {' | '.join(cells)} |")
    holds = [bar_holds(seconds, *bar, "time") for bar in BARS]
    if not options.no_memory:
        holds.append(bar_holds(memory, *MEMORY_BAR, "memory"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = options.peak * 1e12 or next((value for word, value in PEAKS.items() if word in name), 0.0)
    if peak:
        utilization(bench, peak, seconds, forwards)
    return all(holds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["S/4", "B/4"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "mixed", "bfloat16"])
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu is for one thread of a busy machine"
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--peak", type=float, default=0.0, help="dense bfloat16 peak in TFLOP/s of a device that is not known"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave memory out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        device = torch.device("cpu")
        bench = Bench(options.sizes[0], options.batch, device, options.precision, options.compile)
        child(bench, options.child)
        return 0
    # Every size is measured, also after a bar that does not hold.
    held = [attempt(size, partial(report, options, size)) for size in options.sizes]
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
