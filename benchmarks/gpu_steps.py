"""Seconds, utilization and memory of a step of every method and of bare loops, a section of benchmarks/gpu.sh: eager and compiled, and
recorded as CUDA graphs.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bare_loops import FLOW_MATCHING, LOOPS, OFFICIAL, PLAIN, BareLoop
from measurements import Results
from soflow_core.guidance import VelocityGuidance
from soflow_core.networks import DiT, DiTConfig, dit_config
from soflow_core.nfe import training_evaluations
from soflow_core.objectives import OBJECTIVES, Batch, Draws, FlowMatching, MeanFlow, Objective, SoFlow
from soflow_core.recorded_passes import WARM_UP
from soflow_core.sharding import compile_blocks
from soflow_core.train_step import TrainStep, TrainStepConfig

if TYPE_CHECKING:
    from gpu_suite import Options

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 peak in FLOP/s, by a word of the device's name."""
COMPILED = (PLAIN, "flow_matching", "soflow", "meanflow")
"""Rows that are also measured compiled, which takes many seconds; other methods have graphs on the first network alone."""
TOTAL_STEPS = 1000
STARTED = 5
"""Steps in a row that are not waited for."""
AHEAD = "steps not waited for"
RESERVED = 160
"""Seconds that are left to the sections after this one."""
GOALS = (
    ("steps", "soflow", PLAIN, 1.45),
    ("steps", "flow_matching", FLOW_MATCHING, 1.05),
    ("steps", "soflow", OFFICIAL, 1 / 3),
    ("steps", "soflow", "meanflow", 1.0),
    ("peak memory", "soflow", "meanflow", 1.0),
)
"""Section, numerator and denominator of a ratio, and the most that it should be."""
UTILIZATION_GOAL = 45.0
"""Per cent, at least, of XL/2."""

TINY = "tiny/4"
WAYS = ((False, False), (True, False), (False, True), (True, True))
"""Whether a step is compiled, and whether its passes are recorded."""


def network_of(size: str, channels: int, height: int, width: int, guidance_scale: bool = False) -> DiTConfig:
    """The architecture of a named size, or a tiny one for a CPU, of 1000 classes."""
    common = {"classes": 1000, "null_label": True, "guidance_scale": guidance_scale}
    if size == TINY:
        return DiTConfig(channels, height, width, patch=4, hidden=32, depth=2, heads=2, **common)
    return dit_config(size, channels, height, width, **common)


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    networks: tuple[str, ...]
    batch: int
    rounds: int


FULL, SMALL = Sizes(("B/2", "XL/2"), 64, 5), Sizes((TINY,), 4, 1)


def methods() -> dict[str, Objective]:
    """Every method with its own settings; MeanFlow guided as SoFlow is: omega = m w, kappa = 1 - m, up to tau."""
    found: dict[str, Objective] = {name: kind() for name, kind in OBJECTIVES.items()}
    found["meanflow"] = MeanFlow(guidance=VelocityGuidance(omega=0.75, kappa=0.75, end=0.8))
    return found


def steps(results: Results, options: Options) -> None:
    """Measure all rows of each size, eager ones first, as far as time allows. Then the ratios that have a goal.

    Graphs are of a GPU; bare loops have none.
    """
    sizes = SMALL if options.small else FULL
    reserved = 40 if options.small else RESERVED
    for compiled, graphs in WAYS:
        for size in sizes.networks:
            for name in (*LOOPS, *methods()):
                if compiled and (name not in COMPILED or options.small):
                    continue
                if graphs and (name in LOOPS or options.device.type != "cuda"):
                    continue
                if graphs and size != sizes.networks[0] and name not in COMPILED:
                    continue
                what = row_name(size, name, compiled, graphs)
                if options.left < reserved:
                    results.skipped[f"step of {what}"] = "no time was left"
                    continue
                try:
                    _measure(results, options, size, name, sizes, compiled, graphs)
                except RuntimeError as error:
                    results.skipped[f"step of {what}"] = " ".join(str(error).split())[:200]
                gc.collect()
                if options.device.type == "cuda":
                    torch.cuda.empty_cache()
    ratios(results, sizes.networks)


def row_name(size: str, name: str, compiled: bool, graphs: bool = False) -> str:
    return f"{size} {name}, {'compiled' if compiled else 'eager'}{', graphs' if graphs else ''}"


def _measure(
    results: Results, options: Options, size: str, name: str, sizes: Sizes, compiled: bool, graphs: bool
) -> None:
    device, rows, what = options.device, sizes.batch, row_name(size, name, compiled, graphs)
    objective = _objective(name)
    config = network_of(size, 4, 32, 32, objective.conditions_on_scale)
    shape = (config.channels, config.height, config.width)
    with device:
        torch.manual_seed(0)
        network = DiT(config)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        torch.randn(rows, *shape, generator=generator), torch.randint(1000, (rows,), generator=generator)
    ).to(device)
    training = None
    if name not in LOOPS:
        settings = TrainStepConfig(TOTAL_STEPS, compile=compiled, graphs=graphs)
        training = TrainStep(network, objective, settings)
    step = _bare_step(name, network, compiled) if training is None else _checked(training)

    def once() -> float:
        draws = objective.draw(generator, rows, shape, conditional=True).to(device)
        _wait(device)
        started = time.perf_counter()
        step(batch, draws)
        _wait(device)
        return time.perf_counter() - started

    for _ in range(WARM_UP + 1 if graphs else 1 if options.small else 2):
        once()
    if graphs and (training is None or training.recorded is None or training.recorded.recording is None):
        raise RuntimeError("the passes were not recorded")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = [once() for _ in range(sizes.rounds)]
    seconds = results.add("steps", what, [1000 * each for each in taken], "ms", "lower") / 1000
    line = f"{what}: {1000 * seconds:.1f} ms, {rows / seconds:,.0f} images/s"
    if device.type == "cuda":
        passes = training_evaluations(objective, rows) * rows / seconds
        line += _used(results, what, config, passes, device)
    print(line, flush=True)
    if training is not None:
        draws = [objective.draw(generator, rows, shape, conditional=True).to(device) for _ in range(STARTED)]
        _started(results, what, training, batch, draws)


def _started(results: Results, what: str, training: TrainStep, batch: Batch, draws: Sequence[Draws]) -> None:
    """Add the seconds of a step where the host waits for the last alone.

    Raises RuntimeError where one waits for a GPU before that, or is not finite.
    """
    training.runs_ahead = True
    training.start(batch, draws[0])
    training.finish()
    _wait(training.device)
    begun = time.perf_counter()
    with _no_waiting(training.device):
        for each in draws:
            training.start(batch, each)
    queued = time.perf_counter()
    records = training.finish()
    _wait(training.device)
    done = time.perf_counter()
    if not records[-1].finite:
        raise RuntimeError(f"{records[-1].culprit} is not finite")
    results.add(AHEAD, what, 1000 * (done - begun) / len(draws), "ms", "lower")
    results.add(
        "host's share of steps not waited for", what, 100 * (queued - begun) / (done - begun), "%", "lower"
    )
    print(
        f"{what}: {1000 * (done - begun) / len(draws):.1f} ms where {len(draws)} steps are not waited for",
        flush=True,
    )


@contextmanager
def _no_waiting(device: torch.device) -> Iterator[None]:
    """Context in which an operation that waits for a GPU raises RuntimeError."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _used(results: Results, what: str, config: DiTConfig, passes: float, device: torch.device) -> str:
    """Add a row's share of the GPU's peak, where that is known, by the forward passes of one sample that its evaluations
    of a second are worth, and its memory. Returns both in words.
    """
    text, name = "", torch.cuda.get_device_name(device)
    peak = next((value for word, value in PEAKS.items() if word in name), 0.0)
    if peak:
        used = 100 * passes * _forward_flops(config, device) / peak
        results.add("model FLOPs utilization", what, used, "%", "higher")
        text = f", {used:.1f} % of the bfloat16 peak"
    memory = torch.cuda.max_memory_allocated(device) / 2**30
    results.add("peak memory", what, memory, "GiB", "lower")
    return f"{text}, {memory:.1f} GiB"


def _objective(name: str) -> Objective:
    """Of a row: a method, or what a bare loop's noise and times are drawn for."""
    if name in LOOPS:
        return SoFlow() if name == OFFICIAL else FlowMatching()
    return methods()[name]


def _checked(training: TrainStep) -> Callable[[Batch, Draws], None]:
    """A step that is waited for, and raises RuntimeError where it was refused."""

    def step(batch: Batch, draws: Draws) -> None:
        record = training(batch, draws)
        if not record.finite:
            raise RuntimeError(f"{record.culprit} is not finite")

    return step


def _bare_step(name: str, network: DiT, compiled: bool) -> Callable[[Batch, Draws], None]:
    if compiled:
        compile_blocks(network)
    loop = BareLoop(name, network, TOTAL_STEPS)

    def step(batch: Batch, draws: Draws) -> None:
        loss = loop(batch, draws)
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of {name} is not finite")

    return step


_FLOPS: dict[DiTConfig, float] = {}


def _forward_flops(config: DiTConfig, device: torch.device) -> float:
    """FLOPs of a forward pass of one sample."""
    if config not in _FLOPS:
        with device:
            network: nn.Module = DiT(config)
            x, t = torch.zeros(1, config.channels, config.height, config.width), torch.full((1,), 0.5)
            label = torch.zeros(1, dtype=torch.int64)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(x, t, t, label)
        _FLOPS[config] = float(counter.get_total_flops())
    return _FLOPS[config]


def ratios(results: Results, sizes: Sequence[str]) -> None:
    """Add and print each ratio of GOALS whose two rows were measured, and the utilization of XL/2."""
    found = {(each.section, each.name): each.value for each in results.measurements}
    for size in sizes:
        for compiled in (False, True):
            for section, top, bottom, most in GOALS:
                # The official code is not compiled, and no bare loop but the plain one is measured so.
                fixed = bottom in LOOPS and bottom not in COMPILED
                over = found.get((section, row_name(size, bottom, compiled and not fixed)))
                value = found.get((section, row_name(size, top, compiled)))
                if value is None or not over:
                    continue
                name = f"{row_name(size, top, compiled)} / {bottom}"
                verdict = "holds" if value / over <= most else "MISSED"
                results.add(f"{section}, ratios", name, value / over, "", "lower")
                print(f"{section}: {name} {value / over:.3f}, goal at most {most:.3g}: {verdict}", flush=True)
            _ratios_of_graphs(results, found, size, compiled)
            used = found.get(("model FLOPs utilization", row_name(size, "soflow", compiled)))
            if used is not None and size == "XL/2":
                verdict = "holds" if used >= UTILIZATION_GOAL else "MISSED"
                print(
                    f"utilization of {row_name(size, 'soflow', compiled)} {used:.1f} %, goal at least 45 %: {verdict}"
                )


def _ratios_of_graphs(
    results: Results, found: dict[tuple[str, str], float], size: str, compiled: bool
) -> None:
    """Add and print, of each method, the step with graphs over that without, waited for and not; the update is recorded where not."""
    for section in ("steps", AHEAD):
        for name in methods():
            without, graphs = (
                found.get((section, row_name(size, name, compiled, each))) for each in (False, True)
            )
            if without and graphs:
                what = f"{row_name(size, name, compiled, True)} / without"
                results.add(f"{section}, ratios", what, graphs / without, "", "lower")
                print(f"{section}: {what} {graphs / without:.3f}", flush=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
