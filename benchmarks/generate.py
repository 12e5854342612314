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
from dataclasses import asdict
from pathlib import Path

import torch

from soflow_core.networks import DiT, dit_config
from soflow_core.objectives import OBJECTIVES, SoFlow
from soflow_core.samplers.noise import sample_noise
from soflow_core.weights import save_weights
from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.shards.info import DatasetInfo
from soflow_platform.cluster.actor_pool import Progress
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


def loop(weights: Path, autoencoder: str | None, num: int) -> float:
    """Images per second of the bare sampler."""
    generator = Generator.open(weights, autoencoder=autoencoder)
    labels = [i % 10 for i in range(num)]
    started = time.perf_counter()
    for samples in generator.samples(range(num), labels, seed=0, steps=1):
        decode_samples(samples, generator.decoder)
    return num / (time.perf_counter() - started)


def job(weights: Path, autoencoder: str | None, num: int, workers: int, folder: Path) -> float:
    """Images per second of the job, once its workers are up: timed from the first images to the last."""
    marks: list[tuple[float, int]] = []
    request = GenerateRequest(
        str(weights),
        str(folder),
        num=num,
        format="webdataset",
        autoencoder=autoencoder,
        workers=workers,
    )
    project = ProjectFolder(folder.parent / "runs")

    def note(progress: Progress) -> None:
        marks.append((time.perf_counter(), progress.done))

    generate(request, project, TrackingStore(project.tracking_uri), note)
    first = next(mark for mark in marks if mark[1])
    return (marks[-1][1] - first[1]) / (marks[-1][0] - first[0])


def compare(name: str, weights: Path, autoencoder: str | None, options: argparse.Namespace) -> None:
    """Prints the job over the loop, in turn."""
    loops, jobs, ratios = [], [], []
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory() as folder:
            loops.append(loop(weights, autoencoder, options.num))
            jobs.append(job(weights, autoencoder, options.num, 1, Path(folder) / "out"))
            ratios.append(jobs[-1] / loops[-1])
    print(
        f"{name}: loop {statistics.median(loops):.1f} images/s, job {statistics.median(jobs):.1f} images/s, "
        f"job over loop {statistics.median(ratios):.3f}",
        flush=True,
    )
    if options.workers > 1:
        with tempfile.TemporaryDirectory() as folder:
            rate = job(weights, autoencoder, options.num, options.workers, Path(folder) / "out")
        print(f"{name}: {options.workers} workers over one {rate / statistics.median(jobs):.2f}", flush=True)


def command(weights: Path, num: int, folder: Path) -> tuple[float, float, float]:
    """A `soflowctl generate` of its own: seconds to the first image, seconds in all, peak memory in MB."""
    words = ["generate", "--model", str(weights), "--out", str(folder), "--num", str(num), "--workers", "1"]
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
    return first or time.perf_counter() - started, time.perf_counter() - started, peak


def one_image(info: DatasetInfo, size: str) -> dict[str, float]:
    """Seconds of one image by each sampler, on one network and one thread; the median of three, of one for many steps."""
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
                started = time.perf_counter()
                objective.sample(network, noise, label, steps, renoise)
                measured.append(time.perf_counter() - started)
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
        compare("digits, S/2", weights, None, options)
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
            options.num = options.latents
            compare("latents, S/4, decoded to 256 x 256", latent, str(options.autoencoder), options)
        for num in [1000, options.large] if options.large else [100]:
            first, whole, peak = command(weights, num, root / f"command-{num}")
            print(
                f"command of {num} images: first after {first:.1f} s, all after {whole:.1f} s, peak {peak:.0f} MB",
                flush=True,
            )
    seconds = one_image(DatasetInfo(kind="latents", shape=(4, 32, 32), dtype="float16", classes=10), "S/4")
    fastest = seconds["SoFlow, 1 step"]
    for name, value in seconds.items():
        print(f"one image, S/4: {name} {value:.4f} s, {value / fastest:.0f} times one step", flush=True)


if __name__ == "__main__":
    main()
