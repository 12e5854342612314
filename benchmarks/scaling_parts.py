"""What else than the step itself grows with GPUs: loader, draws, agreement, checkpoints, curves; and how far each reaches.

`table_rows` computes with the rates of `Rates`; `measured` measures those of them that a machine without a GPU can tell.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from soflow_platform.training.step_time import (
    HOST_COPY,
    SAMPLE_BYTES,
    Device,
    Fabric,
    Work,
    ddp_step,
)

ROWS, MORE_ROWS = 8, 32
"""Samples of a GPU: with fewer than 8 a step is mostly what moves whatever the batch. Gradients are shown for both."""
SAVE_STEPS, LOG_STEPS, POINTS = 10_000, 100, 12
"""Steps between two checkpoints and between two points of every curve, as xl2.yaml has them, and curves of a trial."""
FURTHEST = 2**20
"""GPUs beyond which nothing is looked for."""


@dataclass(frozen=True)
class Rates:
    """What one machine, storage or server does; the first five are measured by `scaling.py --measure` on two cores."""

    load: float = 3.3e-6
    """CPU seconds of a latent that the loader hands over as it is stored."""
    draw: float = 21e-6
    """CPU seconds of the noise and times of a latent by `training.draws: generator`."""
    save: float = 0.6e9
    """Bytes per second of a checkpoint to a local disk, checksums included."""
    point: float = 0.1e-3
    """Seconds of the tracking store, SQLite, for one point of a curve in a request of 1,000."""
    request: float = 7.5e-3
    """Seconds of the tracking store for a request of few points."""
    storage: float = 10e9
    """Bytes per second that the storage of the shards gives to all nodes together: assumed."""
    shared: float = 2e9
    """Bytes per second that the storage of the checkpoints takes from all nodes together: assumed."""


@dataclass(frozen=True)
class Part:
    """One part of training that grows."""

    name: str
    limit: float
    """Of `use`, at which it breaks."""
    use: Callable[[int], float]
    """Number of GPUs -> share of a step's time that is lost, or share of a capacity that is used."""
    of: str
    """What `use` is a share of."""

    def breaks_at(self, node: int) -> int | None:
        """The least number of GPUs, by doubling, at which the limit is passed; None up to FURTHEST."""
        ranks = node
        while ranks <= FURTHEST:
            if self.use(ranks) > self.limit:
                return ranks
            ranks *= 2
        return None


def parts(work: Work, rates: Rates, fast: Fabric, slow: Fabric) -> list[Part]:
    """The parts, with ROWS samples for each GPU: one trial on all of them, and for the last ones a trial on each node."""
    device, node, state = Device(), fast.node, 4 * work.gradient_bytes
    alone = ddp_step(work, device, fast, node, node * ROWS).total

    def step(ranks: int) -> float:
        return ddp_step(work, device, fast, ranks, ranks * ROWS).total

    def exposed(fabric: Fabric, rows: int) -> Callable[[int], float]:
        return lambda ranks: 1 - ddp_step(work, device, fabric, ranks, ranks * rows).efficiency

    def curves(trials: float, seconds: float) -> float:
        """Share of the tracking store's time."""
        return trials * (POINTS * rates.point + rates.request) / (LOG_STEPS * seconds)

    return [
        *(
            Part(f"gradients, {fabric.name}, {rows} rows", 0.1, exposed(fabric, rows), "a step")
            for fabric in (fast, slow)
            for rows in (ROWS, MORE_ROWS)
        ),
        Part("agreement on a stop", 0.1, lambda n: fast.all_reduce(8, n) / step(n), "a step"),
        Part("loader of a node", 1.0, lambda n: min(n, node) * ROWS * rates.load / step(n), "one core"),
        Part("draws, `generator`", 1.0, lambda n: n * ROWS * rates.draw / step(n), "one core of each worker"),
        Part(
            "first epoch from storage",
            1.0,
            lambda n: n * ROWS * SAMPLE_BYTES / step(n) / rates.storage,
            f"{rates.storage / 1e9:g} GB/s",
        ),
        Part(
            "stall of checkpoints", 0.01, lambda n: state / HOST_COPY / (SAVE_STEPS * step(n)), "the training"
        ),
        Part(
            "writing a checkpoint",
            1.0,
            lambda n: state / rates.save / (SAVE_STEPS * step(n)),
            "the time to the next",
        ),
        Part("curves of one trial", 1.0, lambda n: curves(1, step(n)), "the tracking store"),
        Part("curves, a trial on each node", 1.0, lambda n: curves(n / node, alone), "the tracking store"),
        Part(
            "checkpoints, a trial on each node",
            1.0,
            lambda n: n / node * state / (SAVE_STEPS * alone) / rates.shared,
            f"{rates.shared / 1e9:g} GB/s",
        ),
    ]


def table_rows(work: Work, rates: Rates, fast: Fabric, slow: Fabric) -> list[tuple[str, ...]]:
    """Name, what its share is of, the share with 1, 8 and 64 nodes, the limit, and where it is passed."""
    rows = []
    for part in parts(work, rates, fast, slow):
        breaks = part.breaks_at(fast.node)
        where = f"{breaks:,} GPUs" if breaks else f"not up to {FURTHEST:,}"
        shares = (_percent(part.use(fast.node * nodes)) for nodes in (1, 8, 64))
        rows.append((part.name, part.of, *shares, f"{100 * part.limit:g}%", where))
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%" if share < 0.0995 else f"{100 * share:.0f}%"


def measured(rates: Rates) -> Rates:
    """Rates with those of this machine, in a minute, with 3 GB of memory and 4 GB of disk."""
    load, (save, _) = _loader_seconds(), _checkpoint_rate()
    point, request = _tracking_seconds()
    return replace(rates, load=load, draw=_draw_seconds(), save=save, point=point, request=request)


def _loader_seconds() -> float:
    """CPU seconds of a latent handed over as it is stored."""
    from draws import INFO, latents, loading
    from soflow_pipelines.shards.writer import write_shards

    with tempfile.TemporaryDirectory() as folder:
        write_shards(latents(), Path(folder) / "set", INFO, per_shard=1024)
        return 1e-6 * loading(Path(folder) / "set", "stored", 256)


def _draw_seconds() -> float:
    """CPU seconds of the noise and times of a latent on the CPU."""
    from draws import SHAPE, cpu_of_an_image
    from soflow_core.objectives import SoFlow

    return 1e-6 * cpu_of_an_image(lambda: SoFlow().draw(None, 256, SHAPE, conditional=True), 256)


def _checkpoint_rate() -> tuple[float, float]:
    """(bytes per second of a save, of a load) of a simulated state of 80 M parameters, in parts."""
    import argparse

    from checkpoints import measure

    parameters = 80_000_000
    seconds = measure(argparse.Namespace(parameters=parameters, to=None, rounds=3, no_source=False))
    return 16 * parameters / seconds["save"], 16 * parameters / seconds["load"]


def _tracking_seconds() -> tuple[float, float]:
    """(seconds for a point in a request of 1,000, seconds for a request of one point) of MLflow over SQLite."""
    from soflow_platform.storage.project import ProjectFolder
    from soflow_platform.tracking.run_writer import POINTS_PER_BATCH, RunWriter
    from soflow_platform.tracking.store import Tracking

    with tempfile.TemporaryDirectory() as folder:
        project = ProjectFolder(Path(folder))
        tracking = Tracking.open(project.tracking_uri, "scaling", project)
        run = tracking.open_run("sweep", "trial", params={}, tags={}, trial="trial")
        writer = RunWriter(tracking.store, run)

        def seconds(count: int) -> float:
            taken = []
            for number in range(8):
                points = [
                    ("train/loss", 0.5, 1_700_000_000_000, number * count + step) for step in range(count)
                ]
                started = time.perf_counter()
                writer.write_metrics(points)
                taken.append(time.perf_counter() - started)
            return statistics.median(taken)

        request = seconds(1)
        return max(0.0, seconds(POINTS_PER_BATCH) - request) / POINTS_PER_BATCH, request
