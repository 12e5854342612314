"""Every benchmark in a small form, as one JSON file, and what moved since another one beyond its noise.

    python benchmarks/all.py [--only step loader] [--against FILE] [--repeat 2] [--save NAME]

Each benchmark runs `--repeat` times in a process of its own; the numbers that it prints are its measurements, and half their
range is their noise. They are compared with the newest file of benchmarks/results/ with such numbers, or with `--against`. On
another machine exact numbers alone are compared. `--save NAME` writes benchmarks/results/bench-NAME.json and the table of
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
from collections.abc import Iterator
from dataclasses import dataclass
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
SECONDS = 300
"""Of one run of a benchmark."""
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
            "8, step",
            "64, step",
            "256, step",
            "gradients, 400 Gb/s for each GPU, 8 rows, passed at",
            "gradients, 100 Gb/s for each node, 32 rows, passed at",
            "draws, `generator`, passed at",
            "curves, a trial on each node, passed at",
            "checkpoints, a trial on each node, passed at",
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
    "step": Small("--sizes S/8 --batch 4 --rounds 3 --threads 1 --clock cpu --no-memory"),
    "host_copy": Small("--size S/8 --batch 2 --rounds 2"),
    "checkpoints": Small("--rounds 2"),
    "shard_count": Small(""),
    "loader": Small("--samples 2000"),
    "fid": Small("--dim 512 --rounds 1"),
    "draws": Small("--batch 256 --steps 40"),
    "prepare": Small("--repeat 1 --copies 1"),
    "generate": Small("--num 256 --latents 0 --repeat 1"),
    "startup": Small("--rounds 1"),
    "overhead": Small("--rounds 1 --size S/8 --batch 8"),
    "sweep": Small("--trials 1 --steps 20"),
    "network_options": Small("--steps 20 --seeds 1 --samples 200 --only none rope"),
    "guidance_condition": Small("--steps 20 --seeds 2 --samples 200 --scales 1 3"),
}
FINISHED = {"recognition": "needs a finished sweep: run it alone"}
"""Benchmarks that have no small form."""


def numbers(text: str) -> Iterator[tuple[str, float]]:
    """What a benchmark printed: the numeric cells of its tables, and the numbers of its other lines, each with a name."""
    header: list[str] = []
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not header:
                header = cells
            elif set(line) - set("|-: "):
                for name, cell in zip(header[1:], cells[1:], strict=False):
                    found = NUMBER.fullmatch(cell.split(" ")[0]) if cell else None
                    if found:
                        yield f"{cells[0]}, {name}", float(found[0].replace(",", ""))
            continue
        header = []
        plain = VERDICT.sub("", line.strip())
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
    lines = [
        f"{results.date}: {machine}; load {results.load:g} as it began.",
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


def comparable(before: Results, now: Results) -> tuple[Results, str]:
    """The results before, without what another machine or another selection of benchmarks cannot be compared by."""
    measured = {each.section for each in now.measurements}
    kept = [each for each in before.measurements if each.section in measured]
    note = ""
    if before.machine != now.machine:
        note = " (another machine: exact numbers alone are compared)"
        kept = [each for each in kept if BENCHMARKS.get(each.section, Small("")).exact]
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
        started = time.monotonic()
        try:
            run(name, options.repeat, results)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            results.skipped[name] = " ".join(str(error).split())[:300]
        results.seconds[name] = time.monotonic() - started
        counted = sum(each.section == name for each in results.measurements)
        print(f"{name}: {counted} numbers in {results.seconds[name]:.0f} s", flush=True)
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
