"""soflowctl export and soflowctl import: generators out of and into the registry."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from soflow_platform.cli.options import (
    MOST_IMAGES,
    MOST_STEPS,
    AddressOption,
    Places,
    StorageOption,
    TrackingOption,
)
from soflow_platform.cli.terminal import quiet_libraries, stdout_to_stderr, storage_flag, tracking_flag
from soflow_platform.storage.project import find_project, require_writable

if TYPE_CHECKING:
    from soflow_platform.jobs.export import ExportRequest
    from soflow_platform.jobs.import_weights import ImportRequest


class ExportKind(str, Enum):
    """Formats of `soflowctl export`."""

    safetensors = "safetensors"
    torch_export = "torch-export"
    onnx = "onnx"
    diffusers = "diffusers"


class Kept(str, Enum):
    """Which weights of a checkpoint are imported."""

    ema = "ema"
    model = "model"


class SecondTime(str, Enum):
    """What the second time embedding of an imported network is given."""

    difference = "difference"
    time = "time"


class NoiseAt(str, Enum):
    """The time of pure noise of an imported network with one time."""

    zero = "0"
    one = "1"


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="models:/NAME@ALIAS, a sweep, SWEEP/TRIAL or MLflow run, a checkpoint folder or .safetensors file.",
        ),
    ],
    to: Annotated[ExportKind, typer.Option(help="Format of the file, or of the folder for diffusers.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write; of diffusers, a new folder.")],
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Sampling steps in the program.")] = 1,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="ID|PATH", help="Decodes latents; default is the one they were made with."),
    ] = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Write a generator as one file (its weights, or a program from noise and labels to images) or as a folder for diffusers.

    What was written is loaded and run, and its images compared with the generator's, before it is published.
    """
    from soflow_platform.jobs.export import ExportRequest

    export_command(ExportRequest(model, to.value, out, steps, autoencoder), storage, tracking)


def import_checkpoint(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="Checkpoint of SoFlow's, MeanFlow's, α-Flow's or SiT's code."
        ),
    ],
    name: Annotated[str, typer.Option(help="Registered model that it becomes a version of.")],
    network: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Size that it should have, such as XL/2; default: any.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Method that it was trained with; default: that of the code whose names its tensors have."
        ),
    ] = None,
    weights: Annotated[Kept, typer.Option(help="The EMA weights or the trained ones.")] = Kept.ema,
    classes: Annotated[
        int | None, typer.Option(min=1, help="Number of classes; default: that of --data.")
    ] = None,
    data: Annotated[str | None, typer.Option(metavar="URI", help="Shard set that it was trained on.")] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="ID|PATH", help="Autoencoder of its latents; default: that of --data."),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads, of a network of no named size.")
    ] = None,
    second_time: Annotated[
        SecondTime,
        typer.Option(
            help="What the second time embedding is given: the difference t - s of the times, or the time s."
        ),
    ] = SecondTime.difference,
    noise_at: Annotated[
        NoiseAt | None, typer.Option(help="Time of pure noise, of a network with one time: 0 for SiT.")
    ] = None,
    score: Annotated[
        bool,
        typer.Option("--score", help="Evaluate what was registered, against --data, and log the scores."),
    ] = False,
    num: Annotated[
        int | None,
        typer.Option(min=2, max=MOST_IMAGES, help="With --score: samples to score; default 50,000."),
    ] = None,
    address: AddressOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Register a checkpoint of published code (SoFlow, MeanFlow, α-Flow, SiT) as a version of a model, and score it with --score."""
    from soflow_platform.jobs.import_weights import ImportRequest

    if score and data is None:
        raise typer.BadParameter("--score needs --data, whose images are the reference.")
    if not score and (num is not None or address is not None):
        raise typer.BadParameter("--num and --address belong to --score: leave them out.")
    request = ImportRequest(
        checkpoint=checkpoint,
        name=name,
        network=network,
        method=method,
        which="ema" if weights is Kept.ema else "model",
        classes=classes,
        data=data,
        autoencoder=autoencoder,
        heads=heads,
        second_time="difference" if second_time is SecondTime.difference else "time",
        noise_at=None if noise_at is None else 0 if noise_at is NoiseAt.zero else 1,
    )
    import_command(request, Places(address, storage, tracking), score, num)


def export_command(request: ExportRequest, storage_option: str | None, tracking: str | None) -> None:
    """Write the file, and say by how much its images differ from the generator's."""
    project = find_project(storage_option)
    from soflow_platform.jobs.export import export
    from soflow_platform.tracking.store import TrackingStore

    quiet_libraries()
    store = TrackingStore(tracking or project.tracking_uri)
    with stdout_to_stderr():
        done = export(request, project, store)
    print(
        f"{done.out}: {done.bytes / 1e6:.1f} MB, {request.format}; its images differ from the generator's by at most "
        f"{done.difference:.1g} in [-1, 1]"
    )


def import_command(
    request: ImportRequest, places: Places, score: bool = False, num: int | None = None
) -> None:
    """Register the checkpoint, and score it or print the command that does."""
    project = find_project(places.storage)
    require_writable(project)
    from soflow_platform.cluster.connection import require_answer
    from soflow_platform.jobs.import_weights import import_weights

    require_answer(places.address)
    quiet_libraries()
    with stdout_to_stderr():
        version = import_weights(request, project, places.tracking or project.tracking_uri)
    print(f"models:/{request.name}/{version} is registered, with alias candidate")
    if not score:
        flags = storage_flag(project) + tracking_flag(project, places.tracking)
        print(f"next: {scoring_command(request, version)}{flags}")
        return
    from soflow_platform.cli.evaluate import evaluate_command
    from soflow_platform.jobs.requests import EvaluateRequest, ProtocolRequest

    protocol = ProtocolRequest(autoencoder=request.autoencoder)
    evaluate_command(
        EvaluateRequest(f"models:/{request.name}/{version}", num, protocol=protocol), places, as_json=False
    )


def scoring_command(request: ImportRequest, version: str) -> str:
    """The command that scores what was imported; it names what the version does not say: real images, a folder."""
    words = ["soflowctl evaluate", shlex.quote(f"models:/{request.name}/{version}")]
    if request.data is None:
        words.append("--reference IMAGES")
    if request.autoencoder is not None and Path(request.autoencoder).expanduser().is_dir():
        words.append(f"--autoencoder {shlex.quote(request.autoencoder)}")
    return " ".join(words)
