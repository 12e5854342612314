"""The folder in which the commands of the documents run: small data under the names that the pages use."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.writer import Sample, write_shards
from tests.support.commands import REDUCED
from tests.support.documents import BLOCKS, COMMANDS, ROOT

SMALL_NETWORK = ("--set", "network={patch: 4, hidden: 32, depth: 2, heads: 2}")
SMALL_UNET = tuple(
    word
    for setting in ("base=8", "multipliers=[1, 1]", "blocks=1", "time_width=16")
    for word in ("--set", f"network.{setting}")
)
SMALL_SAMPLES = ("--set", "evaluation.samples=64", "--set", "evaluation.grid=4")
CIFAR_ON_TWO_CORES = tuple(
    word
    for command in COMMANDS
    if command.block.page.stem == "methods-cifar10" and "network.size=S/8" in command.arguments
    for word in command.arguments[5:]
)
ONE_TRIAL = ("--set", "search.space={objective.weight_power: [0.5]}")
TWO_METHODS = ("--set", "search.space={objective: [{method: soflow}, {method: flow_matching}]}")


def make_workplace(folder: Path) -> Path:
    """Fills the folder and returns it."""
    (folder / "sweeps").symlink_to(ROOT / "sweeps")
    (folder / "docs").symlink_to(ROOT / "docs")
    for block in BLOCKS:
        if block.mark == "file" and "/" not in block.value:
            (folder / block.value).write_text(block.text)
    write_cifar10(folder / "cifar-10-binary.tar.gz", images=40)
    write_pixels(folder / "CIFAR", images=64)
    write_latents(folder / "LATENTS", latents=64, classes=10)
    write_latents(folder / "CIFAR-LATENTS", latents=64, classes=10, side=4)
    write_latents(folder / "imagenet-latents", latents=64, classes=1000)
    return folder


def reduced(arguments: list[str]) -> list[str]:
    """The same command on a network that trains in seconds."""
    program, *rest = arguments
    if program == "python" and rest[0] == "docs/pictures/samples.py":
        return [*arguments, "--steps", "4", "--out", "samples.png"]
    if rest[:1] not in (["run"], ["compare"]) or "--dry-run" in rest:
        return arguments
    sweep = Path(rest[1]).stem
    if sweep == "digits" and rest[0] == "run":
        return [*arguments, *REDUCED, *ONE_TRIAL]
    if sweep == "my-sweep":
        steps = ("--set", "training.batch=32", "--set", "training.steps=20", "--set", "evaluation.every=20")
        return [*arguments, *SMALL_NETWORK, *SMALL_SAMPLES, *steps, *ONE_TRIAL]
    if sweep == "digits-guidance":
        points = ("--set", "search.first=[{}, {objective.guidance.mix: 1.0}]", "--set", "search.seeds=1")
        steps = ("--set", "training.steps=20", "--set", "evaluation.every=20", "--set", "training.batch=32")
        return [*arguments, *SMALL_NETWORK, *SMALL_SAMPLES, *steps, *points]
    of_methods = ("methods-digits", "methods-cifar10-latents")
    tuned = sweep.endswith("-tuned")
    if sweep.removesuffix("-tuned") in of_methods or sweep == "samples":
        steps = ("--set", "training.steps=20", "--set", "evaluation.every=20", "--set", "training.batch=32")
        steps = steps if sweep == "samples" else (*steps, *TWO_METHODS)
        comparison = ("--set", "comparison=[{steps: [1, 2], samples: 64}]")
        cheap = ("--no-costs",) if rest[0] == "compare" else ()
        seeds = ("--set", "search.final.seeds=2") if tuned else ()
        return [*arguments, *SMALL_NETWORK, *SMALL_SAMPLES, *steps, *comparison, *cheap, *seeds]
    if sweep in ("cifar10", "cifar10-unet"):
        steps = (
            "--set",
            "search.trials=1",
            "--set",
            "search.asha=!drop",
            *(SMALL_UNET if sweep == "cifar10-unet" else SMALL_NETWORK),
            "--set",
            "training.steps=6",
        )
        scores = ("--set", "evaluation.features=pooled", "--set", "search.metric=eval/fd_nfe1")
        scores = (*scores, "--set", "evaluation.final_samples=null")
        machine = (
            "--set",
            "resources={cpus_per_worker: 1}",
            "--set",
            "evaluation.every=6",
            "--set",
            "training.batch=8",
        )
        return [*arguments, *SMALL_SAMPLES, *steps, *scores, *machine]
    if sweep == "methods-cifar10":
        # Its head has settings for two cores beside those for a GPU.
        small = () if any("network.size" in word for word in rest) else CIFAR_ON_TWO_CORES
        cheap = ("--no-costs",) if rest[0] == "compare" else ()
        return [*arguments, *small, *TWO_METHODS, *cheap]
    return arguments


def write_cifar10(path: Path, images: int) -> None:
    """CIFAR-10's binary archive, with so many images in each of its six files."""
    generator = np.random.default_rng(0)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            rows = generator.integers(0, 256, (images, 3073), dtype=np.uint8)
            rows[:, 0] = np.arange(images) % 10
            add(archive, f"cifar-10-batches-bin/{name}", rows.tobytes())
        classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        add(archive, "cifar-10-batches-bin/batches.meta.txt", "\n".join(classes).encode())


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_pixels(folder: Path, images: int) -> None:
    generator = np.random.default_rng(0)
    info = DatasetInfo(kind="pixels", shape=(3, 32, 32), dtype="uint8", classes=10)
    rows = generator.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8)
    write_shards((Sample(f"{i:08d}", row, i % 10) for i, row in enumerate(rows)), folder, info, total=images)


def write_latents(folder: Path, latents: int, classes: int, side: int = 32) -> None:
    """Posterior means and standard deviations (8, side, side), as those of the ImageNet recipe."""
    generator = np.random.default_rng(0)
    info = DatasetInfo(
        kind="latents",
        shape=(4, side, side),
        dtype="float16",
        classes=classes,
        autoencoder="stabilityai/sd-vae-ft-mse",
        scaling=0.18215,
    )
    mean = generator.standard_normal((latents, 4, side, side)) * 4
    rows = np.concatenate([mean, np.full_like(mean, 0.1)], axis=1).astype(np.float16)
    write_shards(
        (Sample(f"{i:08d}", row, i % classes) for i, row in enumerate(rows)), folder, info, total=latents
    )
