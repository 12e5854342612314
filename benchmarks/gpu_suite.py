"""The sections of benchmarks/gpu.sh, one after the other within a time limit; a section that fails is named and the others go on.

python benchmarks/gpu_suite.py [--device cuda] [--small] [--seconds 470] [--only parity steps] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gpu_digits import train_digits
from gpu_sampling import sampling
from gpu_steps import steps
from measurements import Results
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.writer import Sample, write_shards

ROOT = Path(__file__).parents[1]
TESTS_SECONDS = 110
PLAIN = "--import-mode=importlib -p no:cacheprovider -rfE"
"""Options of pytest in place of those of pyproject.toml, whose -q hides the counts."""


@dataclass(frozen=True)
class Options:
    """Settings of a run."""

    device: torch.device
    small: bool
    deadline: float
    """By time.monotonic()."""

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def core_tests(results: Results, options: Options) -> None:
    """The tests of soflow_core, in as many processes as there are cores to spare."""
    files = ["tests/core"]
    if options.small:
        files = ["tests/core/test_paths.py"]
    cores = min(8, (os.cpu_count() or 1) // 2)
    several = ["-n", str(cores), "--dist", "loadfile"] if cores > 1 and not options.small else []
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        f"addopts={PLAIN}",
        *several,
        "-m",
        "not slow and not faults",
        *files,
    ]
    limit = max(1.0, min(TESTS_SECONDS, options.left))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    print(f"core tests: {last}")
    counts = {
        kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)
    }
    if not counts:
        raise RuntimeError(f"pytest reported no tests: {last} {done.stderr.strip()[-300:]}")
    results.add("core tests", "passed", counts.get("passed", 0), "", "higher")
    results.add("core tests", "failed", counts.get("failed", 0) + counts.get("error", 0), "", "lower")
    for line in re.findall(r"^(?:FAILED|ERROR) (.+)$", done.stdout, re.MULTILINE):
        results.skipped[f"core test {line.split(' - ')[0]}"] = "failed"


def parity(results: Results, options: Options) -> None:
    """Largest deviation from losses and gradients of the official implementation, in float32 on this device."""
    import json

    from safetensors.torch import load_file

    from tests.support.reference_cases import CASES, load_case

    folder = ROOT / "tests" / "reference"
    settings = json.loads((folder / "soflow_reference.json").read_text())
    tensors = load_file(folder / "soflow_reference.safetensors")
    loss, gradient = 0.0, 0.0
    for name in CASES:
        for branch in ("velocity", "consistency"):
            case = load_case(name, settings, tensors)
            network, batch = case.network.to(options.device), case.batch.to(options.device)
            draws = case.velocity_draws() if branch == "velocity" else case.consistency_draws()
            found = case.objective.loss(
                network, batch, draws.to(options.device), case.settings["k"], case.settings["K"]
            )
            found.loss.backward()
            wanted = case.settings[branch]["loss"]
            loss = max(loss, abs(found.loss.item() - wanted) / abs(wanted))
            expected = case.gradients(branch)
            for key, parameter in network.named_parameters():
                if parameter.grad is not None:
                    scale = expected[key].abs().max().clamp_min(1e-12)
                    gradient = max(
                        gradient, float((parameter.grad.cpu() - expected[key]).abs().max() / scale)
                    )
    results.add("parity", "largest deviation of a loss, relative", loss, "", "lower")
    results.add("parity", "largest deviation of a gradient, of its largest element", gradient, "", "lower")
    print(f"parity over {len(CASES)} cases: loss {loss:.2g}, gradients {gradient:.2g}")


def loading(results: Results, options: Options) -> None:
    """Latents from shards on this disk to the device, and as far as host memory."""
    count, batch, rounds = (256, 64, 3) if options.small else (8192, 256, 5)
    rng = np.random.default_rng(0)

    def latents() -> list[Sample]:
        shape = (8, 32, 32)
        return [
            Sample(f"{n:08d}", rng.standard_normal(shape, np.float32).astype(np.float16), n % 10)
            for n in range(count)
        ]

    with tempfile.TemporaryDirectory(prefix="soflow-gpu-") as folder:
        info = DatasetInfo(kind="latents", shape=(4, 32, 32), dtype="float16", classes=10, scaling=0.18215)
        write_shards(latents(), Path(folder) / "set", info)
        for threads in (1, 4):
            with ShardLoader(Path(folder) / "set", batch, threads=threads) as loader:
                for name, target in (("to host memory", None), ("to the device", options.device)):
                    rates = [_rate(loader, count // batch, batch, target) for _ in range(rounds + 1)][1:]
                    rate = results.add("loader", f"{name}, {threads} thread(s)", rates, "samples/s", "higher")
                    print(f"loader {name}, {threads} thread(s): {rate:,.0f} samples/s")


def _rate(loader: ShardLoader, batches: int, rows: int, device: torch.device | None) -> float:
    started = time.perf_counter()
    for _ in range(batches):
        batch = next(loader)
        if device is not None:
            batch.x0.to(device, non_blocking=True)
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return batches * rows / (time.perf_counter() - started)


SECTIONS: dict[str, Callable[[Results, Options], None]] = {
    "parity": parity,
    "core tests": core_tests,
    "steps": steps,
    "loader": loading,
    "sampling": sampling,
    "digits": train_digits,
}


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers depend on."""
    facts = {"torch": torch.__version__, "Python": platform.python_version(), "cores": str(os.cpu_count())}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "GPU": properties.name,
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "CUDA": str(torch.version.cuda),
        }
    return facts


def run(options: Options, sections: list[str], results: Results) -> bool:
    """Measure the sections; True where none failed and nothing that should pass did not."""
    for name in sections:
        if options.left < 5:
            results.skipped[name] = "no time was left"
            continue
        print(f"--- {name} ({options.left:.0f} s left)", flush=True)
        started = time.monotonic()
        try:
            SECTIONS[name](results, options)
        except Exception as error:
            results.skipped[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{name} failed: {results.skipped[name]}", file=sys.stderr, flush=True)
        results.seconds[name] = time.monotonic() - started
    failed = [each for each in results.measurements if each.key == "core tests: failed" and each.value]
    return not results.skipped and not failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU, two minutes")
    parser.add_argument("--seconds", type=float, help="time limit; default 470, with --small 110")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--name", help="of the results; default: that of the device")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    limit = arguments.seconds or (110 if arguments.small else 470)
    options = Options(device, arguments.small, time.monotonic() + limit)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", (arguments.name or gpu).lower()).strip("-")
    results = Results(name, machine(device))
    sound = run(options, arguments.only, results)
    results.write(arguments.out / f"{name}.json")
    (arguments.out / f"{name}.md").write_text(results.markdown(), encoding="utf-8")
    print(results.markdown())
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
