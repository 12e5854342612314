"""Seconds and peak memory of one training step of each method, beside the plain step of the same network.

    python benchmarks/step.py --sizes S/4 B/4 --batch 16 --threads 2
    python benchmarks/step.py --device cuda --sizes B/2 XL/2 --batch 64 --precision mixed --compile

All rows share one network, one optimizer and one batch; the rounds go through the rows in turn, and a row's
time is the median of its rounds. `plain` is forward, squared error, backward and update, without EMA. `F` is
the measured number of multiply-adds over those of one forward pass of the batch (the plain step is 3). Bars:
`soflow` at most 0.95 of `six calls` and 1.55 of `plain`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from soflow_six_calls import six_call_loss
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from soflow_core.guidance import VelocityGuidance
from soflow_core.networks import DiT, dit_config
from soflow_core.objectives import Batch, FlowMatching, Loss, MeanFlow, Objective, SoFlow
from soflow_core.passes import PassPolicy
from soflow_core.training import OptimizerConfig, TrainStep

ROWS = ["plain", "flow matching", "soflow", "in pieces", "six calls", "meanflow"]
PIECES = 4
"""Of the row `in pieces`, which is SoFlow."""
# MeanFlow guided as SoFlow's default is: omega = m w, kappa = 1 - m, up to tau.
MATCHED = VelocityGuidance(omega=0.75, kappa=0.75, end=0.8)
TOTAL_STEPS = 1000
BARS = (("soflow", "six calls", 0.95), ("soflow", "plain", 1.55))
# Dense bfloat16 peak in FLOP/s, by a word of the device's name.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


class SixCalls(SoFlow):
    """SoFlow with its loss in six calls."""

    def loss(self, network, batch, draws, step, total_steps, policy=None):
        del policy
        return Loss(six_call_loss(self, network, batch, draws, step, total_steps), {})


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
        config = dit_config(self.size, channels=4, height=32, width=32, classes=1000, null_label=True)
        network = DiT(config).to(self.device)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        compiled = self.compile
        self.step = TrainStep(
            network, SoFlow(), OptimizerConfig(), TOTAL_STEPS, precision=self.precision, compile=compiled
        )
        self.generator = torch.Generator().manual_seed(0)
        self.batch = Batch(
            torch.randn(self.batch_size, 4, 32, 32, generator=self.generator),
            torch.randint(1000, (self.batch_size,), generator=self.generator),
        )

    def objective(self, row: str) -> Objective:
        return {
            "flow matching": FlowMatching(),
            "soflow": SoFlow(),
            "in pieces": SoFlow(),
            "six calls": SixCalls(),
            "meanflow": MeanFlow(guidance=MATCHED),
        }[row]

    def make(self, row: str) -> Callable[[], None]:
        """One step of this row, with new draws each time."""
        if row == "plain":
            return self.plain
        objective = self.objective(row)

        def step() -> None:
            self.step.objective = objective
            self.step.accumulate = PIECES if row == "in pieces" else 1
            draws = objective.draw(self.generator, self.batch_size, (4, 32, 32), conditional=True)
            assert self.step(self.batch, draws).finite

        return step

    def plain(self) -> None:
        batch, network = self.batch.to(self.device), self.step.module
        t = torch.rand(self.batch_size, device=self.device)
        self.step.optimizer.zero_grad(set_to_none=True)
        half = self.precision in ("mixed", "bfloat16")
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            prediction = network(batch.x0, t, t, batch.labels)
        (prediction.float() - batch.x0).square().mean().backward()
        self.step.optimizer.step()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forwards(self, row: str) -> float:
        """Multiply-adds of a step over those of one forward pass, in eager float32 with the mathematical
        attention.
        """
        network, policy = self.step.module, PassPolicy(skip_unused=self.step.policy.skip_unused)
        batch = self.batch.to(self.device)
        t = torch.full((self.batch_size,), 0.5, device=self.device)
        counts = []
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network(batch.x0, t, t, batch.labels)
            forward = counter.get_total_flops()
            for _ in range(2):
                with FlopCounterMode(display=False) as counter:
                    if row == "plain":
                        network(batch.x0, t, t, batch.labels).square().mean().backward()
                    else:
                        objective = self.objective(row)
                        draws = objective.draw(self.generator, self.batch_size, (4, 32, 32), True).to(
                            self.device
                        )
                        objective.loss(network, batch, draws, 0, TOTAL_STEPS, policy).loss.backward()
                counts.append(counter.get_total_flops() / forward)
        return statistics.mean(counts)


def times(bench: Bench, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each row, over rounds that go through the rows in turn."""
    steps = {row: bench.make(row) for row in ROWS if not (bench.compile and row == "meanflow")}
    for step in steps.values():
        step()
    taken: dict[str, list[float]] = {row: [] for row in steps}
    for _ in range(rounds):
        for row, step in steps.items():
            bench.wait()
            start = clock()
            step()
            bench.wait()
            taken[row].append(clock() - start)
    return {row: statistics.median(values) for row, values in taken.items()}


def peak_memory(options: argparse.Namespace, size: str, row: str) -> float:
    """GiB: of the device on a GPU, of a process that does two steps of this row alone on a CPU."""
    command = [
        sys.executable,
        str(Path(__file__)),
        "--child",
        row,
        "--sizes",
        size,
        "--batch",
        str(options.batch),
    ]
    command += [
        "--device",
        options.device,
        "--precision",
        options.precision,
        "--threads",
        str(options.threads),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(result.stdout.splitlines()[-1])["peak"])


def child(bench: Bench, row: str) -> None:
    step = bench.make(row)
    step()
    step()
    if bench.device.type == "cuda":
        peak = float(torch.cuda.max_memory_allocated(bench.device))
    else:
        # The high-water mark of this address space; getrusage would count the parent's from before the exec.
        status = Path("/proc/self/status").read_text().split()
        peak = 1024.0 * int(status[status.index("VmHWM:") + 1])
    print(json.dumps({"peak": peak / 2**30}))


def report(options: argparse.Namespace, size: str) -> bool:
    """Prints the table of one size and its bars; True where every bar holds."""
    bench = Bench(size, options.batch, torch.device(options.device), options.precision, options.compile)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds = times(bench, options.rounds, clock)
    eager = replace(bench, compile=False) if options.compile else bench
    forwards = {row: eager.forwards(row) for row in seconds}
    memory = {} if options.no_memory else {row: peak_memory(options, size, row) for row in seconds}
    print(
        f"\n{size}, batch {options.batch}, {options.device}, {options.precision},"
        f" {torch.get_num_threads()} threads, {options.clock} clock"
    )
    print("| step | s | of plain | F | peak GiB |\n|---|---|---|---|---|")
    for row, value in seconds.items():
        ratio = value / seconds["plain"]
        size_text = f"{memory[row]:.2f}" if row in memory else "-"
        print(f"| {row} | {value:.3f} | {ratio:.3f} | {forwards[row]:.2f} | {size_text} |")
    holds = True
    for top, bottom, bar in BARS:
        ratio = seconds[top] / seconds[bottom]
        holds &= ratio <= bar
        print(f"{top} / {bottom} = {ratio:.3f}, bar {bar}: {'holds' if ratio <= bar else 'MISSED'}")
    peak = next(
        (v for k, v in PEAKS.items() if bench.device.type == "cuda" and k in torch.cuda.get_device_name()), 0
    )
    if peak:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            x = bench.batch.x0.to(bench.device)
            t = torch.ones(len(x), device=bench.device)
            bench.step.module(x, t, t, None)
        for row in ("plain", "soflow"):
            used = forwards[row] * counter.get_total_flops() / seconds[row] / peak
            print(f"model FLOPs utilization of {row}: {100 * used:.1f}% of {peak / 1e12:.0f} TFLOP/s")
    return holds


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
        "--no-memory", action="store_true", help="leave out the process that measures each row's memory"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        bench = Bench(options.sizes[0], options.batch, torch.device(options.device), options.precision, False)
        child(bench, options.child)
        return 0
    missed = [size for size in options.sizes if not report(options, size)]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
