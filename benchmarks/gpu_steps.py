"""Seconds, utilization and memory of a training step of every method, eager and compiled: a section of benchmarks/gpu.sh."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from measurements import Results
from soflow_core.guidance import VelocityGuidance
from soflow_core.networks import DiT, DiTConfig, dit_config
from soflow_core.nfe import training_evaluations
from soflow_core.objectives import OBJECTIVES, Batch, MeanFlow, Objective
from soflow_core.train_step import TrainStep, TrainStepConfig

if TYPE_CHECKING:
    from gpu_suite import Options

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 peak in FLOP/s, by a word of the device's name."""
COMPILED = ("flow_matching", "soflow", "meanflow")
"""Methods that are also measured compiled; a compilation takes many seconds."""
TOTAL_STEPS = 1000
RESERVED = 160
"""Seconds that are left to the sections after this one."""


TINY = "tiny/4"


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
    """Measure all methods of each size; compiled ones last, as far as time allows."""
    sizes = SMALL if options.small else FULL
    reserved = 40 if options.small else RESERVED
    for compiled in (False, True):
        for size in sizes.networks:
            for name, objective in methods().items():
                if compiled and (name not in COMPILED or options.small):
                    continue
                what = f"{size} {name}, {'compiled' if compiled else 'eager'}"
                if options.left < reserved:
                    results.skipped[f"step of {what}"] = "no time was left"
                    continue
                try:
                    _measure(results, options, what, size, objective, sizes, compiled)
                except RuntimeError as error:
                    results.skipped[f"step of {what}"] = " ".join(str(error).split())[:200]
                gc.collect()
                if options.device.type == "cuda":
                    torch.cuda.empty_cache()
    _memory_beside_meanflow(results)


def _measure(
    results: Results,
    options: Options,
    what: str,
    size: str,
    objective: Objective,
    sizes: Sizes,
    compiled: bool,
) -> None:
    device, rows = options.device, sizes.batch
    config = network_of(size, 4, 32, 32, objective.conditions_on_scale)
    shape = (config.channels, config.height, config.width)
    with device:
        torch.manual_seed(0)
        network = DiT(config)
    step = TrainStep(network, objective, TrainStepConfig(TOTAL_STEPS, compile=compiled))
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        torch.randn(rows, *shape, generator=generator), torch.randint(1000, (rows,), generator=generator)
    ).to(device)

    def once() -> float:
        draws = objective.draw(generator, rows, shape, conditional=True).to(device)
        _wait(device)
        started = time.perf_counter()
        record = step(batch, draws)
        _wait(device)
        if not record.finite:
            raise RuntimeError(f"{record.culprit} is not finite")
        return time.perf_counter() - started

    for _ in range(1 if options.small else 2):
        once()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = [once() for _ in range(sizes.rounds)]
    seconds = results.add("steps", what, [1000 * each for each in taken], "ms", "lower") / 1000
    forwards = training_evaluations(objective, rows)
    line = f"{what}: {1000 * seconds:.1f} ms, {rows / seconds:,.0f} images/s"
    peak = next(
        (
            value
            for word, value in PEAKS.items()
            if device.type == "cuda" and word in torch.cuda.get_device_name(device)
        ),
        0.0,
    )
    if peak:
        used = 100 * forwards * rows * _forward_flops(config, device) / seconds / peak
        results.add("model FLOPs utilization", what, used, "%", "higher")
        line += f", {used:.1f} % of the bfloat16 peak"
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**30
        results.add("peak memory", what, memory, "GiB", "lower")
        line += f", {memory:.1f} GiB"
    print(line, flush=True)


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


def _memory_beside_meanflow(results: Results) -> None:
    """Ratios of SoFlow's time and memory to those of MeanFlow of the same size."""
    found = {(each.section, each.name): each.value for each in results.measurements}
    for (section, name), value in found.items():
        other = found.get((section, name.replace(" soflow,", " meanflow,")))
        if " soflow," in name and other and section in ("steps", "peak memory"):
            results.add(f"{section} over MeanFlow's", name, value / other, "", "lower")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
