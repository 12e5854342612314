"""Every benchmark in a small form, as one JSON file, and what moved since another one beyond its noise.

    python benchmarks/all.py [--only step loader] [--against FILE] [--repeat 2] [--save NAME]

Each benchmark runs `--repeat` times in a process of its own; the numbers that it prints are its measurements, and half their
range is their noise. They are compared with the newest file of benchmarks/results/ with such numbers, or with `--against`. On
another machine exact numbers alone are compared, and of benchmarks beside which other programs took more than a tenth of the
machine no times. `--save NAME` writes benchmarks/results/bench-NAME.json and the table of
docs/performance.md; without it the results go to build/bench.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from measurements import Results, moved

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- written by benchmarks/all.py --save -->", "<!-- until here -->"
"""Lines of the page around its table."""
NUMBER = re.compile(r"(?<![\w./-])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.])")
VERDICT = re.compile(r",? (?:bar|limit) .*$")
LOGGED = re.compile(r"\d{4}-\d\d-\d\dT")
SECONDS = 300
"""Of one run of a benchmark."""
BUSY = 0.1
"""Share of the processors that other programs may take beside a benchmark whose times are compared."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
"""Several threads that wait for each other make numbers of a busy machine worthless."""


@dataclass(frozen=True)
class Small:
    """A benchmark and the arguments of its small form."""

    arguments: str
    exact: bool = False
    """Whether it computes, and measures nothing: one run is enough."""
    shown: tuple[str, ...] = ()
    """Numbers that stand in docs/performance.md."""


BENCHMARKS = {
    "scaling": Small(
        "",
        exact=True,
        shown=(
            "Parts of a step, batch 256, fast, ms: GPUs 8, step",
            "Parts of a step, batch 256, fast, ms: GPUs 64, step",
            "Parts of a step, batch 256, fast, ms: GPUs 256, step",
            "Growth: gradients, 400 Gb/s for each GPU, 8 rows, passed at",
            "Growth: gradients, 100 Gb/s for each node, 32 rows, passed at",
            "Growth: draws, `generator`, passed at",
            "Growth: curves, a trial on each node, passed at",
            "Growth: checkpoints, a trial on each node, passed at",
        ),
    ),
    "precision": Small(
        "--size S/8 --batch 2 --batches 1",
        exact=True,
        shown=tuple(
            f"{pair}, r = {ratio}"
            for pair in ("float32", "tf32", "bfloat16")
            for ratio in ("0.1", "0.01", "0.002")
        ),
    ),
    "step": Small(
        "--sizes S/8 --batch 4 --rounds 3 --threads 1 --clock cpu --no-memory",
        shown=("flow matching, of plain", "soflow, of plain", "six calls, of plain", "meanflow, of plain"),
    ),
    "host_copy": Small("--size S/8 --batch 2 --rounds 2", shown=("a save, of a step",)),
    "checkpoints": Small("--rounds 2", shown=("save / plain write = #", "load / plain read = #")),
    "shard_count": Small(
        "",
        shown=(
            "shards, samples 10 of 100,000, step ms",
            "shards, samples 1,000 of 100,000, step ms",
            "shards, samples 1,000 of 100,000, bytes of a sample",
        ),
    ),
    "loader": Small("--samples 2000", shown=("met at least # times h5py: # [2]",)),
    "fid": Small("--dim 512 --rounds 1"),
    "draws": Small("--batch 256 --steps 40"),
    "prepare": Small("--repeat 1 --copies 1"),
    "generate": Small("--small"),
    "decoding": Small("--small"),
    "startup": Small("--rounds 1"),
    "overhead": Small("--rounds 1 --size S/8 --batch 8", shown=("platform / bare = #",)),
    "sweep": Small("--trials 1 --steps 20"),
    "network_options": Small("--steps 20 --seeds 1 --samples 200 --only none rope"),
    "guidance_condition": Small("--steps 20 --seeds 2 --samples 200 --scales 1 3"),
}
FINISHED = {"recognition": "needs a finished sweep: run it alone"}
"""Benchmarks that have no small form."""


def numbers(text: str) -> Iterator[tuple[str, float]]:
    """What a benchmark printed: the numeric cells of its tables, and the numbers of its other lines, each with a name of its own.

    A name begins with the heading above (`## ...`). That of a cell goes on with the row (`GPUs 8`) and the column, that of another
    number is its line with # for each number.
    """
    title, named = "", Counter[str]()
    for kind, lines in groupby(text.splitlines(), lambda line: line[:1] if line[:1] in ("|", "#") else ""):
        if kind == "#":
            title = list(lines)[-1].lstrip("# ").strip() + ": "
            continue
        for label, value in _cells(list(lines)) if kind else _in_lines(lines):
            named[title + label] += 1
            again = f" ({named[title + label]})" if named[title + label] > 1 else ""
            yield f"{title}{label}{again}", value


def _cells(lines: list[str]) -> Iterator[tuple[str, float]]:
    """The numbers that the cells of a table begin with, by row and column."""
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in lines
        if set(line) - set("|-: ")
    ]
    heads, *rows = rows
    keys = 1
    if len({row[0] for row in rows}) < len(rows) and all(
        "." not in cell for row in rows for cell in row[1:2]
    ):
        # Rows of two settings, such as GPUs and batch.
        keys = 2
    for row in rows:
        named = [
            f"{head} {cell}" if NUMBER.match(cell) else cell
            for head, cell in zip(heads[:keys], row[:keys], strict=False)
        ]
        for head, cell in zip(heads[keys:], row[keys:], strict=False):
            found = NUMBER.match(cell)
            if found:
                yield f"{', '.join(named)}, {head}", float(found[0].rstrip(",").replace(",", ""))


def _in_lines(lines: Iterable[str]) -> Iterator[tuple[str, float]]:
    """The numbers of lines of text, but for limits and lines of a log. A name does not depend on how wide a number is printed."""
    for line in lines:
        if LOGGED.match(line):
            continue
        plain = " ".join(VERDICT.sub("", line.strip()).split())
        found_all = NUMBER.findall(plain)
        label = NUMBER.sub("#", plain)
        for place, found in enumerate(found_all, start=1):
            yield f"{label} [{place}]" if len(found_all) > 1 else label, float(found.replace(",", ""))


def run(name: str, repeat: int, results: Results) -> None:
    """Run a benchmark, and take what it prints. A run that exits with 1 missed one of its own limits, which is named."""
    small = BENCHMARKS[name]
    command = [sys.executable, f"benchmarks/{name}.py", *small.arguments.split()]
    taken: dict[str, list[float]] = {}
    for _ in range(1 if small.exact else repeat):
        done = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        if done.returncode not in (0, 1) or not done.stdout.strip():
            lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
            raise RuntimeError(lines[-1][:300])
        if done.returncode == 1:
            results.skipped[f"{name}: a limit"] = next(
                (line for line in done.stdout.splitlines() if "MISSED" in line), "exit code 1"
            )
        for label, value in numbers(done.stdout):
            taken.setdefault(label, []).append(value)
    for label, values in taken.items():
        results.add(name, label, values)


def newest(names: set[str]) -> Path | None:
    """The newest file of results with numbers of these benchmarks."""
    found = [
        path
        for path in RESULTS.glob("*.json")
        if {m.section for m in Results.read(path).measurements} & names
    ]
    return max(found, key=lambda path: (Results.read(path).date, path.name), default=None)


def page_table(results: Results) -> str:
    """The numbers of `Small.shown` as a table in Markdown, with the machine and each benchmark's command."""
    machine = ", ".join(f"{key} {value}" for key, value in results.machine.items())
    found = {(each.section, each.name): each for each in results.measurements}
    timed = [share for name, share in results.others.items() if not BENCHMARKS[name].exact]
    beside = f"; other programs took up to {max(timed):.0%} of it" if max(timed, default=0.0) > BUSY else ""
    lines = [
        f"{results.date}: {machine}; load {results.load:g} as it began{beside}.",
        "",
        "| benchmark | number | value | noise |",
        "|---|---|---|---|",
    ]
    for name, small in BENCHMARKS.items():
        for shown in small.shown:
            each = found.get((name, shown))
            noise = "exact" if small.exact else f"{100 * each.noise:.0f}%" if each else ""
            value = f"{each.value:.4g}" if each else "not measured"
            command = f"{name}.py {small.arguments}".strip()
            lines.append(f"| `{command}` | {shown} | {value} | {noise} |")
    return "\n".join(lines)


def written(page: str, table: str) -> str:
    """A page with the table between its two lines."""
    before, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end:
        raise ValueError(f"{PAGE} lacks the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{table}\n\n{end}{after}"


def processor() -> str:
    """The processor's model, as the system names it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def taken_by_others(seconds: float = 1.0) -> float:
    """Share of the processors that is taken while this process waits; 0 where the system does not say."""

    def ticks() -> tuple[int, int]:
        # user, nice, system, idle, waiting for disks, interrupts, ...
        every = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(every), every[3] + every[4]

    try:
        before = ticks()
        time.sleep(seconds)
        total, idle = (now - then for now, then in zip(ticks(), before, strict=True))
    except (OSError, ValueError, IndexError):
        return 0.0
    return 1 - idle / total if total else 0.0


def comparable(before: Results, now: Results) -> tuple[Results, str]:
    """The results before, without what another machine, selection of benchmarks or other programs keep from being compared."""
    measured = {each.section for each in now.measurements}
    kept = [each for each in before.measurements if each.section in measured]
    note = ""
    busy = {name for each in (before, now) for name, share in each.others.items() if share > BUSY}
    if before.machine != now.machine:
        note = " (another machine: exact numbers alone are compared)"
        kept = [each for each in kept if BENCHMARKS.get(each.section, Small("")).exact]
    elif busy := {name for name in busy & measured if not BENCHMARKS.get(name, Small("")).exact}:
        note = f" (not compared, for other programs were at work: {', '.join(sorted(busy))})"
        kept = [each for each in kept if each.section not in busy]
    return Results(before.name, before.machine, kept), note


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--save", metavar="NAME")
    options = parser.parse_args()
    facts = {"torch": torch.__version__, "Python": platform.python_version(), "cores": str(os.cpu_count())}
    results = Results(f"bench-{options.save or 'now'}", {"processor": processor(), **facts})
    results.date = time.strftime("%Y-%m-%d", time.gmtime())
    results.skipped |= FINISHED
    results.load = round(os.getloadavg()[0], 1)
    before = options.against or newest(set(options.only))
    kept = Results.read(before) if before else None
    path = RESULTS / f"{results.name}.json" if options.save else ROOT / "build" / "bench.json"
    for name in options.only:
        others = taken_by_others()
        started = time.monotonic()
        try:
            run(name, options.repeat, results)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            results.skipped[name] = " ".join(str(error).split())[:300]
        results.seconds[name] = time.monotonic() - started
        results.others[name] = round(max(others, taken_by_others()), 2)
        counted = sum(each.section == name for each in results.measurements)
        share = results.others[name]
        beside = f", other programs took {share:.0%} of the machine" if share > BUSY else ""
        print(f"{name}: {counted} numbers in {results.seconds[name]:.0f} s{beside}", flush=True)
        # After each, so that a run that is cut has what it has measured.
        results.write(path)
    print(f"written to {path}")
    if options.save:
        PAGE.write_text(written(PAGE.read_text(), page_table(results)))
        print(f"written to {PAGE}")
    for what, why in results.skipped.items():
        print(f"not measured: {what}: {why}")
    if kept is None:
        print("there are no earlier results to compare with")
        return 0
    old, note = comparable(kept, results)
    sections = {each.section for each in old.measurements}
    now = Results(results.name, results.machine, [m for m in results.measurements if m.section in sections])
    lines = moved(old, now)
    print(f"since {kept.name}{note}: {len(lines) or 'nothing'} moved beyond noise")
    print("\n".join(f"  {line}" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
