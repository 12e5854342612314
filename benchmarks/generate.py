"""Images per second of `soflowctl generate` against the bare sampler loop, and the seconds of one image by each kind of sampler.

python benchmarks/generate.py [--autoencoder DIR] [--workers 2] [--large 50000] [--only latents] [--small]

The loop calls the sampler on batches of the same size, decodes where the network makes latents, and keeps nothing; the job also
encodes PNG, writes parts with checksums and a manifest. Both run in this process on one thread, in turn, on as many images as take
the loop SECONDS. With --workers 2 or more the job is run on Ray too, on as many images and on LONGER times as many; its rate is that
of the images that the longer one made more, so that the start of Ray, printed beside it, does not count. It is compared with the rate
of one worker, measured before and after it, which encodes on another core where one is free. Commands of 1,000 and of --large
images show whether memory grows with the number.

It ends with 1 where a limit is missed. --small makes a few images of each, to see that everything runs, and judges nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch

from soflow_core.networks import DiT, dit_config
from soflow_core.objectives import OBJECTIVES, SoFlow
from soflow_core.samplers.noise import sample_noise
from soflow_core.weights import save_weights
from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.shards.info import DatasetInfo
from soflow_platform.generation.decoding import decode_samples
from soflow_platform.generation.generator import BATCH, Generator
from soflow_platform.jobs.generate import generate
from soflow_platform.jobs.requests import GenerateRequest
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore

SHARED = Path(os.environ.get("SOFLOW_TEST_DATA") or Path(__file__).parents[2] / "shared")
SECONDS = 75
"""Seconds that the images of a comparison take the loop."""
SMALL = 4
"""Images of everything with --small."""
LONGER = 4
"""How many times as many images several workers make in their second run."""
JOB_OVER_LOOP, WORKERS_OVER_ONE, MEMORY_GROWTH, FIRST_IMAGE, MANY_STEPS = 0.95, 0.9, 1.1, 6.0, 900.0
"""Limits: job over loop; rate over one worker's, for each worker; peak memory of --large over that of 1,000; seconds; DDPM over
one step.
"""
SAMPLERS: dict[str, tuple[str, dict[str, str], int]] = {
    "DDPM, 1000 steps": ("diffusion", {"sampler": "ddpm"}, 1000),
    "DDIM, 50 steps": ("diffusion", {"sampler": "ddim"}, 50),
    "Heun, 25 steps": ("flow_matching", {"sampler": "heun"}, 25),
    "SoFlow, 1 step": ("soflow", {}, 1),
}
"""Method, its sampler settings, and steps."""


def save_network(path: Path, info: DatasetInfo, size: str) -> Path:
    """Weights of an untrained network: what it makes costs as much as images do."""
    torch.manual_seed(0)
    channels, height, width = info.shape
    config = dit_config(size, channels, height, width, classes=info.classes, null_label=True)
    save_weights(path, DiT(config).state_dict(), config, SoFlow(), asdict(info))
    return path


@dataclass(frozen=True)
class Cost:
    """What images took, with the opening of the network."""

    seconds: float
    cpu: float
    """Seconds of processor time of this process, all its threads together."""


def loop(weights: Path, autoencoder: str | None, num: int) -> Cost:
    """The bare sampler."""
    started, cpu = time.perf_counter(), time.process_time()
    generator = Generator.open(weights, autoencoder=autoencoder)
    labels = [i % 10 for i in range(num)]
    for samples in generator.samples(range(num), labels, seed=0, steps=1):
        decode_samples(samples, generator.decoder)
    return Cost(time.perf_counter() - started, time.process_time() - cpu)


def job(weights: Path, autoencoder: str | None, num: int, workers: int, folder: Path) -> Cost:
    """The job, from the first part to the last one's end, with the start of its workers."""
    request = GenerateRequest(
        str(weights),
        str(folder),
        num=num,
        format="webdataset",
        autoencoder=autoencoder,
        workers=workers,
    )
    project = ProjectFolder(folder.parent / "runs")
    cpu = time.process_time()
    seconds = generate(request, project, TrackingStore(project.tracking_uri)).seconds
    return Cost(seconds, time.process_time() - cpu)


@dataclass
class Judgement:
    """Limits that were missed."""

    judges: bool
    missed: list[str] = field(default_factory=list)

    def check(self, what: str, value: float, limit: float, at_least: bool) -> str:
        """Notes a value beyond its limit; returns the limit in words."""
        if self.judges and not (value >= limit if at_least else value <= limit):
            self.missed.append(f"{what} is {value:.3g}, the limit is {limit:g}")
        return f"(limit {'>=' if at_least else '<='} {limit:g})" if self.judges else "(not judged)"


def images_of(seconds: float, weights: Path, autoencoder: str | None) -> int:
    """Whole batches of images that take the loop at least so long."""
    loop(weights, autoencoder, BATCH)
    rate = 2 * BATCH / loop(weights, autoencoder, 2 * BATCH).seconds
    return BATCH * math.ceil(seconds * rate / BATCH)


def compare(
    name: str, weights: Path, autoencoder: str | None, options: argparse.Namespace, judgement: Judgement
) -> None:
    """Prints the loop over the job, in turn: 1 where the job is as fast; and several workers over one."""
    num = SMALL if options.small else options.num or images_of(SECONDS, weights, autoencoder)
    loops, jobs = [], []
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory() as folder:
            loops.append(loop(weights, autoencoder, num))
            jobs.append(job(weights, autoencoder, num, 1, Path(folder) / "out"))
    by_clock = statistics.median(a.seconds / b.seconds for a, b in zip(loops, jobs, strict=True))
    by_cpu = statistics.median(a.cpu / b.cpu for a, b in zip(loops, jobs, strict=True))
    rates = [num / statistics.median(cost.seconds for cost in costs) for costs in (loops, jobs)]
    limit = judgement.check(f"{name}: job over loop", by_clock, JOB_OVER_LOOP, at_least=True)
    print(
        f"{name}, {num} images: loop {rates[0]:.1f} images/s, job {rates[1]:.1f} images/s; "
        f"job over loop {by_clock:.3f} by the clock {limit}, {by_cpu:.3f} by processor time",
        flush=True,
    )
    if options.workers > 1:
        compare_workers(name, weights, autoencoder, num, rates[1], options.workers, judgement)


def compare_workers(
    name: str,
    weights: Path,
    autoencoder: str | None,
    num: int,
    before: float,
    workers: int,
    judgement: Judgement,
) -> None:
    """Prints the rate of several workers over one's, which is `before` and is measured again after them."""
    took = []
    for count, images in ((workers, num), (workers, LONGER * num), (1, num)):
        with tempfile.TemporaryDirectory() as folder:
            took.append(job(weights, autoencoder, images, count, Path(folder) / "out").seconds)
    # Of a few images the two may take equally long.
    rate, after = (LONGER - 1) * num / max(took[1] - took[0], 1e-3), num / took[2]
    ratio = rate / statistics.mean((before, after))
    what = f"{name}: {workers} workers over one"
    limit = judgement.check(what, ratio, WORKERS_OVER_ONE * workers, at_least=True)
    print(
        f"{what} {ratio:.2f} {limit}, {rate:.1f} images/s, one {before:.1f} before and {after:.1f} after; "
        f"{took[0] - num / rate:.0f} s to start, {LONGER * num} images in {took[1]:.0f} s",
        flush=True,
    )


def command(weights: Path, num: int, folder: Path) -> tuple[float, float, float]:
    """A `soflowctl generate` of its own: seconds to the first image, seconds of processor time in all, peak memory in MB."""
    words = ["generate", "--model", str(weights), "--out", str(folder), "--num", str(num), "--workers", "1"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "soflow_platform.cli.main", *words], stdout=subprocess.DEVNULL
    )
    # Not the maximum that the system keeps for a process: that one begins with what this process had when it started the other.
    watched, first, peak, seconds = psutil.Process(process.pid), None, 0, 0.0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, watched.memory_info().rss)
            times = watched.cpu_times()
            seconds = times.user + times.system
        if first is None and any(folder.glob("0*.png")):
            first = time.perf_counter() - started
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(process.returncode)
    return first or time.perf_counter() - started, seconds, peak / 2**20


def commands(weights: Path, root: Path, options: argparse.Namespace, judgement: Judgement) -> None:
    """Prints what commands of few and of many images take."""
    peaks = []
    for num in (SMALL, 2 * SMALL) if options.small else (1000, *([options.large] if options.large else [])):
        first, cpu, peak = command(weights, num, root / f"command-{num}")
        limit = judgement.check(f"first of {num} images", first, FIRST_IMAGE, at_least=False)
        print(
            f"command of {num} images: first after {first:.1f} s {limit}, {cpu:.1f} s of processor time in all, peak {peak:.0f} MB",
            flush=True,
        )
        peaks.append(peak)
    if len(peaks) > 1:
        growth = peaks[-1] / peaks[0]
        limit = judgement.check("peak memory of many images over few", growth, MEMORY_GROWTH, at_least=False)
        print(f"peak memory of many images over few {growth:.3f} {limit}", flush=True)


def one_image(info: DatasetInfo, size: str) -> dict[str, float]:
    """Seconds of processor time of one image by each sampler, on one network and one thread; medians of five, of one for many steps."""
    torch.manual_seed(0)
    channels, height, width = info.shape
    network = DiT(dit_config(size, channels, height, width, classes=info.classes, null_label=True)).eval()
    noise, label = sample_noise(0, [0], info.shape), torch.tensor([3])
    seconds = {}
    for name, (method, settings, steps) in SAMPLERS.items():
        objective = OBJECTIVES[method](**settings)
        renoise = [sample_noise(0, [0], info.shape, draw + 1) for draw in range(steps - 1)]
        measured = []
        with torch.inference_mode():
            for _ in range(1 if steps >= 1000 else 5):
                started = time.process_time()
                objective.sample(network, noise, label, steps, renoise)
                measured.append(time.process_time() - started)
        seconds[name] = statistics.median(measured)
    return seconds


def single_images(options: argparse.Namespace, judgement: Judgement) -> None:
    """Prints what one image takes by each sampler, over one step of SoFlow."""
    seconds = one_image(
        DatasetInfo(kind="latents", shape=(4, 32, 32), dtype="float16", classes=10), options.size
    )
    fastest = seconds["SoFlow, 1 step"]
    for name, value in seconds.items():
        ratio = value / fastest
        limit = ""
        if name.startswith("DDPM"):
            limit = " " + judgement.check(
                f"one image by {name} over one step", ratio, MANY_STEPS, at_least=True
            )
        print(
            f"one image, {options.size}: {name} {value:.4f} s, {ratio:.0f} times one step{limit}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--num", type=int, help=f"images of a comparison; default: what takes the loop {SECONDS} s"
    )
    parser.add_argument("--autoencoder", type=Path, default=SHARED / "models" / "kl-f8-mini")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--large", type=int, default=50_000, help="images of a second command, for its memory; 0 for none"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--only", choices=["digits", "latents"], help="compare loop, job and workers for these alone"
    )
    parser.add_argument("--small", action="store_true", help="a few images of each; nothing is judged")
    options = parser.parse_args()
    options.repeat = 1 if options.small else options.repeat
    options.size = "S/8" if options.small else "S/4"
    judgement = Judgement(not options.small)
    torch.set_num_threads(1)
    digits = DatasetInfo(kind="pixels", shape=(1, 8, 8), dtype="uint8", classes=10)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        weights = save_network(root / "digits.safetensors", digits, "S/2")
        if options.only != "latents":
            compare("digits, S/2", weights, None, options, judgement)
        if options.only == "digits":
            print("no latents: only digits are asked for", flush=True)
        elif options.autoencoder.is_dir():
            facts = load_autoencoder(str(options.autoencoder)).facts
            latents = DatasetInfo(
                kind="latents",
                shape=(facts.channels, 32, 32),
                dtype="float16",
                classes=10,
                autoencoder=facts.id,
                autoencoder_digest=facts.digest,
                scaling=facts.scaling,
                shift=facts.shift,
            )
            latent = save_network(root / "latents.safetensors", latents, options.size)
            name = f"latents, {options.size}, decoded to {32 * facts.factor} x {32 * facts.factor}"
            compare(name, latent, str(options.autoencoder), options, judgement)
        else:
            print(f"no latents: there is no autoencoder at {options.autoencoder}", flush=True)
        if options.only is None:
            commands(weights, root, options, judgement)
    if options.only is None:
        single_images(options, judgement)
    if judgement.missed:
        raise SystemExit("\n".join(judgement.missed))


if __name__ == "__main__":
    main()
