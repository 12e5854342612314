"""soflowctl export and soflowctl import: generators out of and into the registry."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from soflow_platform.cli.options import StorageOption, TrackingOption
from soflow_platform.cli.terminal import quiet_libraries, stdout_to_stderr, storage_flag
from soflow_platform.storage.project import find_project, require_writable

if TYPE_CHECKING:
    from soflow_platform.jobs.export import ExportRequest
    from soflow_platform.jobs.import_weights import ImportRequest


class ExportKind(str, Enum):
    """Formats of `soflowctl export`."""

    safetensors = "safetensors"
    torch_export = "torch-export"
    onnx = "onnx"


class Kept(str, Enum):
    """Which weights of a checkpoint are imported."""

    ema = "ema"
    model = "model"


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="models:/NAME@ALIAS, a sweep, SWEEP/TRIAL or MLflow run, a checkpoint folder or .safetensors file.",
        ),
    ],
    to: Annotated[ExportKind, typer.Option(help="Format of the file.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write.")],
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps in the program.")] = 1,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="ID|PATH", help="Decodes latents; default is the one they were made with."),
    ] = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Write a generator as one file: its weights, or a program from noise and labels to images, checked by running it."""
    from soflow_platform.jobs.export import ExportRequest

    export_command(ExportRequest(model, to.value, out, steps, autoencoder), storage, tracking)


def import_checkpoint(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint of the official SoFlow code.")
    ],
    name: Annotated[str, typer.Option(help="Registered model that it becomes a version of.")],
    network: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Size that it should have, such as XL/2; default: any.")
    ] = None,
    method: Annotated[str, typer.Option(help="Method that it was trained with.")] = "soflow",
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
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Register a checkpoint of the official SoFlow code as a version of a model."""
    from soflow_platform.jobs.import_weights import ImportRequest

    which: Literal["ema_model", "model"] = "ema_model" if weights is Kept.ema else "model"
    request = ImportRequest(checkpoint, name, network, method, which, classes, data, autoencoder, heads)
    import_command(request, storage, tracking)


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


def import_command(request: ImportRequest, storage_option: str | None, tracking: str | None) -> None:
    """Register the checkpoint, and print the command that scores it."""
    project = find_project(storage_option)
    require_writable(project)
    from soflow_platform.jobs.import_weights import import_weights

    quiet_libraries()
    with stdout_to_stderr():
        version = import_weights(request, project, tracking or project.tracking_uri)
    print(f"models:/{request.name}/{version} is registered, with alias candidate")
    print(f"next: {scoring_command(request, version)}{storage_flag(project)}")


def scoring_command(request: ImportRequest, version: str) -> str:
    """The command that scores what was imported; it names what the version does not say: real images, a folder."""
    words = [f"soflowctl evaluate models:/{request.name}/{version}"]
    if request.data is None:
        words.append("--reference IMAGES")
    if request.autoencoder is not None and Path(request.autoencoder).expanduser().is_dir():
        words.append(f"--autoencoder {request.autoencoder}")
    return " ".join(words)
