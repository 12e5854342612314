"""Images per second of `soflowctl generate` against the bare sampler loop, and the seconds of one image by each kind of sampler.

python benchmarks/generate.py [--num 4096] [--autoencoder DIR] [--workers 1] [--large 0]

The loop calls the sampler on batches of the same size, decodes where the network makes latents, and keeps nothing; the job also
encodes PNG, writes parts with checksums and a manifest. Both run in this process on one thread, in turn; with --workers 2 or more the
job is run on Ray too, and compared with itself on one worker. --large N makes N images more, to compare the memory with that of --num.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from soflow_core.networks import DiT, dit_config
from soflow_core.objectives import OBJECTIVES, SoFlow
from soflow_core.samplers.noise import sample_noise
from soflow_core.weights import save_weights
from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.shards.info import DatasetInfo
from soflow_platform.generation.decoding import decode_samples
from soflow_platform.generation.generator import Generator
from soflow_platform.jobs.generate import generate
from soflow_platform.jobs.requests import GenerateRequest
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore

SHARED = Path(os.environ.get("SOFLOW_TEST_DATA") or Path(__file__).parents[2] / "shared")
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


def compare(name: str, weights: Path, autoencoder: str | None, num: int, options: argparse.Namespace) -> None:
    """Prints the loop over the job, in turn: 1 where the job is as fast."""
    loops, jobs = [], []
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory() as folder:
            loops.append(loop(weights, autoencoder, num))
            jobs.append(job(weights, autoencoder, num, 1, Path(folder) / "out"))
    by_clock = statistics.median(a.seconds / b.seconds for a, b in zip(loops, jobs, strict=True))
    by_cpu = statistics.median(a.cpu / b.cpu for a, b in zip(loops, jobs, strict=True))
    rates = [num / statistics.median(cost.seconds for cost in costs) for costs in (loops, jobs)]
    print(
        f"{name}, {num} images: loop {rates[0]:.1f} images/s, job {rates[1]:.1f} images/s; "
        f"job over loop {by_clock:.3f} by the clock, {by_cpu:.3f} by processor time",
        flush=True,
    )
    if options.workers > 1:
        with tempfile.TemporaryDirectory() as folder:
            shared = job(weights, autoencoder, num, options.workers, Path(folder) / "out")
        ratio = statistics.median(cost.seconds for cost in jobs) / shared.seconds
        print(f"{name}: {options.workers} workers over one {ratio:.2f}", flush=True)


def command(weights: Path, num: int, folder: Path) -> tuple[float, float, float]:
    """A `soflowctl generate` of its own: seconds to the first image, seconds of processor time in all, peak memory in MB."""
    words = ["generate", "--model", str(weights), "--out", str(folder), "--num", str(num), "--workers", "1"]
    before = processor_time()
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "soflow_platform.cli.main", *words], stdout=subprocess.DEVNULL
    )
    first = None
    while process.poll() is None:
        if first is None and any(folder.glob("0*.png")):
            first = time.perf_counter() - started
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(process.returncode)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return first or time.perf_counter() - started, processor_time() - before, peak


def processor_time() -> float:
    """Seconds of processor time of the commands that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num", type=int, default=4096, help="images of the digits network")
    parser.add_argument("--latents", type=int, default=128, help="images of the latent network, 0 for none")
    parser.add_argument("--autoencoder", type=Path, default=SHARED / "models" / "kl-f8-mini")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--large", type=int, default=0, help="images of a second command, for its memory")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = DatasetInfo(kind="pixels", shape=(1, 8, 8), dtype="uint8", classes=10)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        weights = save_network(root / "digits.safetensors", digits, "S/2")
        compare("digits, S/2", weights, None, options.num, options)
        if options.latents and options.autoencoder.is_dir():
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
            latent = save_network(root / "latents.safetensors", latents, "S/4")
            name = "latents, S/4, decoded to 256 x 256"
            compare(name, latent, str(options.autoencoder), options.latents, options)
        for num in [1000, options.large] if options.large else [100]:
            first, cpu, peak = command(weights, num, root / f"command-{num}")
            print(
                f"command of {num} images: first after {first:.1f} s, {cpu:.1f} s of processor time in all, peak {peak:.0f} MB",
                flush=True,
            )
    seconds = one_image(DatasetInfo(kind="latents", shape=(4, 32, 32), dtype="float16", classes=10), "S/4")
    fastest = seconds["SoFlow, 1 step"]
    for name, value in seconds.items():
        print(f"one image, S/4: {name} {value:.4f} s, {value / fastest:.0f} times one step", flush=True)


if __name__ == "__main__":
    main()
