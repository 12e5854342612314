"""Training on 8 to 512 GPUs by the model of soflow_platform.training.step_time, and the model against real processes.

    python benchmarks/scaling.py            # the tables of docs/scaling.md; computed, in seconds
    python benchmarks/scaling.py --check    # 1, 2 and 4 worker processes on this machine's cores
    python benchmarks/scaling.py --measure  # the rates of the last table that a machine without a GPU can tell, and that table

The tables are those of DiT-XL/2 trained by SoFlow in `mixed` precision. The check trains S/4 in gloo processes
of one thread each: it measures a step without exchange, the exchange of its gradients alone, and the whole
step, and prints each beside what the model says. The model takes three measured numbers: the step of one
worker, how fast two workers exchange a quarter of the gradients, and the number of cores, which more workers
than cores share.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from scaling_parts import Rates, measured, table_rows
from soflow_core.networks import dit_config
from soflow_core.objectives import SoFlow
from soflow_platform.training.step_time import (
    DECODER_FLOPS,
    FLOAT,
    HOST_COPY,
    INCEPTION_FLOPS,
    SAMPLE_BYTES,
    Device,
    Fabric,
    Work,
    ddp_step,
    fsdp_messages,
    fsdp_step,
    work_of,
)

GPUS = (8, 16, 32, 64, 128, 256, 512)
BATCHES = (256, 1024, 4096)
FAST = Fabric("400 Gb/s for each GPU")
SLOW = Fabric("100 Gb/s for each node", between=12.5e9)
RECIPE_STEPS = 1_200_000
"""SoFlow's steps for XL/2, of 256 samples."""

STORAGE = 1e9
"""Bytes per second to the checkpoint storage, hashing included: assumed."""
DRAW = 21e-6
"""Seconds of one core for the noise and times of a latent; `--check` measures them."""


def table(*columns: str) -> None:
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def row(*cells: object) -> None:
    print(f"| {' | '.join(str(cell) for cell in cells)} |")


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}"


def print_work(work: Work) -> None:
    table("pass", "rows", "gradient", "precision", "forwards")
    for number, p in enumerate(work.passes, 1):
        kind = "bfloat16" if p.bfloat16 else "TF32"
        row(number, f"{p.rows:g} B", "yes" if p.gradient else "no", kind, f"{p.forwards:g}")
    print(
        f"\n{work.parameters / 1e6:.2f} M trained parameters, {work.forwards:g} forward passes of each sample"
    )


def print_messages(work: Work) -> None:
    """What a GPU sends in a step, and how long that alone takes."""
    gathers, scatters = fsdp_messages(work)
    table("GPUs", "DDP, GB", "FSDP, GB", "DDP fast, ms", "DDP slow, ms", "FSDP fast, ms", "FSDP slow, ms")
    device = Device()
    for ranks in GPUS:
        share = (ranks - 1) / ranks * work.gradient_bytes / 1e9
        times = [
            step(work, device, fabric, ranks, ranks).communication
            for step in (ddp_step, fsdp_step)
            for fabric in (FAST, SLOW)
        ]
        row(ranks, f"{2 * share:.2f}", f"{(gathers + scatters) * share:.2f}", *map(ms, times))


def print_steps(work: Work, fabric: Fabric) -> None:
    device = Device()
    table("GPUs", *(f"batch {batch}: step ms, images/s, efficiency" for batch in BATCHES))
    for ranks in GPUS:
        cells = []
        for batch in BATCHES:
            if batch < ranks:
                cells.append("-")
                continue
            step = ddp_step(work, device, fabric, ranks, batch)
            cells.append(f"{ms(step.total)}, {batch / step.total:,.0f}, {100 * step.efficiency:.0f}%")
        row(ranks, *cells)


def print_parts(work: Work) -> None:
    device, batch = Device(), 256
    table(
        "GPUs",
        "rows each",
        "arithmetic",
        "weights",
        "sent",
        "exposed",
        "step",
        "days",
        "GPU-hours",
        "FSDP",
        "HSDP",
    )
    for ranks in (r for r in GPUS if r <= batch):
        step = ddp_step(work, device, FAST, ranks, batch)
        sharded = fsdp_step(work, device, FAST, ranks, batch)
        hybrid = fsdp_step(work, device, FAST, ranks, batch, shards=FAST.node)
        seconds = RECIPE_STEPS * step.total
        parts = (step.compute, step.weights, step.communication, step.exposed, step.total)
        recipe = (f"{seconds / 86400:.1f}", f"{seconds / 3600 * ranks:,.0f}")
        row(ranks, batch // ranks, *map(ms, parts), *recipe, ms(sharded.total), ms(hybrid.total))


def print_data(work: Work) -> None:
    device = Device()
    table("GPUs", "batch", "images/s of a GPU", "MB/s of a GPU", "MB/s in all")
    for ranks, batch in ((8, 256), (8, 4096), (64, 1024), (64, 4096), (512, 4096)):
        rate = batch / ddp_step(work, device, FAST, ranks, batch).total
        each = rate / ranks
        row(
            ranks,
            batch,
            f"{each:.1f}",
            f"{each * SAMPLE_BYTES / 1e6:.2f}",
            f"{rate * SAMPLE_BYTES / 1e6:.1f}",
        )


def print_draws(work: Work) -> None:
    """Every worker draws for the whole batch, in a thread, while the step before is at work."""
    shown = (8, 64, 512)
    table("batch", "drawn in, ms", *(f"step of {ranks} GPUs, ms" for ranks in shown))
    for batch in BATCHES:
        steps = [
            ms(ddp_step(work, Device(), FAST, ranks, batch).total) if batch >= ranks else "-"
            for ranks in shown
        ]
        row(batch, ms(batch * DRAW), *steps)


def print_pauses(work: Work) -> None:
    """Evaluations and checkpoints, for the recipe's batch."""
    device = Device()
    state = 4 * work.gradient_bytes
    print(
        f"checkpoint: {state / 1e9:.1f} GB, copied to the host in {state / HOST_COPY:.2f} s, written in the background in "
        f"{state / STORAGE:.0f} s\n"
    )
    table(
        "GPUs",
        "step, ms",
        "checkpoint every 5,000 steps",
        "10,000 images at 1 and 2 NFE, s",
        "every 10,000 steps",
    )
    for ranks in (8, 64, 256):
        step = ddp_step(work, device, FAST, ranks, 256).total
        flops = 10_000 * (3 * work.forward_flops + 2 * (DECODER_FLOPS + INCEPTION_FLOPS))
        scoring = flops / (device.tf32 * device.utilization * ranks)
        saving = state / HOST_COPY
        shares = (f"{100 * saving / (5000 * step):.2f}%", f"{100 * scoring / (10_000 * step):.2f}%")
        row(ranks, ms(step), shares[0], f"{scoring:.1f}", shares[1])


def print_growth(work: Work, rates: Rates) -> None:
    """Each part of training with 8 rows for each GPU, and the number of GPUs at which it breaks."""
    table("part", "share of", "8 GPUs", "64", "512", "limit", "passed at")
    for cells in table_rows(work, rates, FAST, SLOW):
        row(*cells)


def print_measured(work: Work) -> None:
    rates = measured(Rates())
    table("rate", "measured here", "of the page")
    for each in fields(Rates):
        row(each.name, f"{getattr(rates, each.name):.3g}", f"{getattr(Rates(), each.name):.3g}")
    print()
    print_growth(work, rates)


def xl2() -> Work:
    """SoFlow's step of XL/2."""
    network = dit_config("XL/2", channels=4, height=32, width=32, classes=1000, null_label=True)
    ((_, work),) = work_of(network, SoFlow(), "mixed")
    assert work.gradient_bytes == FLOAT * work.parameters
    return work


def print_tables(work: Work) -> None:
    for title, show in (
        ("Passes of a step", lambda: print_work(work)),
        ("Messages", lambda: print_messages(work)),
        ("Parts of a step, batch 256, fast, ms", lambda: print_parts(work)),
        (f"Steps, {FAST.name}", lambda: print_steps(work, FAST)),
        (f"Steps, {SLOW.name}", lambda: print_steps(work, SLOW)),
        ("Data", lambda: print_data(work)),
        ("Draws", lambda: print_draws(work)),
        ("Pauses", lambda: print_pauses(work)),
        ("Growth", lambda: print_growth(work, Rates())),
    ):
        print(f"\n## {title}\n")
        show()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="hold the model against processes instead")
    parser.add_argument("--measure", action="store_true", help="measure rates of this machine instead")
    parser.add_argument("--size", default="S/4")
    parser.add_argument("--batch", type=int, default=4, help="samples of each worker")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    if options.measure:
        print_measured(xl2())
        return 0
    if not options.check:
        print_tables(xl2())
        return 0
    from scaling_workers import check

    return check(options.size, options.batch, options.steps, options.workers)


if __name__ == "__main__":
    sys.exit(main())
