"""`soflowctl generate`: makes images with a trained network, and checks sets of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from soflow_platform.cli.options import (
    MOST_IMAGES,
    MOST_STEPS,
    RECORDED,
    AddressOption,
    GridOption,
    GuidanceOption,
    IntervalOption,
    Places,
    SamplerOption,
    StorageOption,
    TimesOption,
    TrackingOption,
    check_seed,
    parse_sampling,
    refuse_together,
    sampling_text,
)
from soflow_platform.cli.terminal import image_progress, quiet_libraries, stdout_to_stderr
from soflow_platform.errors import JobError, UserError
from soflow_platform.storage.project import find_project, require_writable_folder

if TYPE_CHECKING:
    from soflow_platform.jobs.generate import Generated
    from soflow_platform.jobs.requests import GenerateRequest

NAMED_DAMAGES = 50


class OutputFormat(str, Enum):
    """How generated images are stored."""

    png = "png"
    webdataset = "webdataset"
    parquet = "parquet"
    npz = "npz"
    latents = "latents"


class Precision(str, Enum):
    """In what network and decoder compute."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def generate(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="models:/NAME@ALIAS, a sweep, SWEEP/TRIAL or MLflow run, a checkpoint folder or .safetensors file.",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="URI", help="Where the images go: a folder or s3://bucket/prefix.")
    ] = None,
    num: Annotated[
        int | None, typer.Option(min=1, max=MOST_IMAGES, help="How many images; default 100.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="balanced: every class in turn, the default; uniform: drawn for each image; or classes in turn, such as 0,1,2."
        ),
    ] = None,
    label: Annotated[int | None, typer.Option(min=0, help="One class for all images.")] = None,
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Parquet file with a column `label`: a row for each image."),
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave out rows of --table that cannot be used: rejected.parquet."),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_STEPS,
            help="Sampling steps for each image; default those of --times, else sampling.steps of the sweep.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i is a function of the seed, i and its label.")] = 0,
    sampler: SamplerOption = None,
    guidance: GuidanceOption = None,
    interval: IntervalOption = None,
    times: TimesOption = None,
    grid: GridOption = None,
    file_format: Annotated[
        OutputFormat | None, typer.Option("--format", help="How images are stored; default png.")
    ] = None,
    latents: Annotated[
        bool, typer.Option("--latents", help="Store samples as the network makes them, not decoded.")
    ] = False,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="ID|PATH", help="Decodes latents; default is the one they were made with."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images decoded and encoded at a time; it does not change them.")
    ] = 64,
    precision: Annotated[
        Precision, typer.Option(help="Of the passes of network and decoder; samples are float32.")
    ] = Precision.float32,
    compile_network: Annotated[
        bool, typer.Option("--compile", help="Compile the network: for sets of many images.")
    ] = False,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="Record a pass of the network on a GPU once, and replay it.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default one for each GPU, or each core.")
    ] = None,
    verify: Annotated[
        str | None, typer.Option(metavar="URI", help="Check a finished set, and make nothing.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    address: AddressOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Make images with a trained network, in one of several formats, with a manifest and checksums.

    The same command makes the images that an interrupted one left out.
    """
    if verify is not None:
        refuse_together({"--model": model, "--out": out, "--num": num, "--table": table}, "--verify")
        verify_command(verify, as_json)
        return
    if model is None or out is None:
        raise typer.BadParameter("--model and --out are needed, or --verify.")
    if skip_bad and table is None:
        raise UserError("--skip-bad leaves out rows of --table: name the table, or leave it out.")
    from soflow_platform.jobs.requests import GenerateRequest

    check_seed(seed)
    chosen = None if steps is None else (steps,)
    sampling, numbers = parse_sampling(sampler, guidance, times, grid, chosen, interval)
    request = GenerateRequest(
        model=model,
        out=out,
        num=num,
        labels=choose_labels(labels, label),
        table=table,
        skip_bad=skip_bad,
        steps=None if numbers is None else numbers[0],
        seed=seed,
        format=choose_format(file_format.value if file_format else None, latents),
        sampling=sampling,
        autoencoder=autoencoder,
        batch=batch_size,
        precision=precision.value,
        compile=compile_network,
        graphs=graphs,
        workers=workers,
        address=address,
    )
    generate_command(request, Places(address, storage, tracking), as_json)


def choose_format(name: str | None, latents: bool) -> str:
    """The output format of --format and --latents. Raises UserError where they contradict each other."""
    if latents and name not in (None, "latents"):
        raise UserError(f"--latents writes raw latents, --format {name} images: leave one of them out.")
    return "latents" if latents else name or "png"


def choose_labels(labels: str | None, label: int | None) -> str | None:
    """The labels of --labels and --label. Raises UserError where both are given, and for signs that no label has."""
    if labels is not None and label is not None:
        raise UserError("--label is one class for all images, --labels several: leave one of them out.")
    if labels is not None and not labels.isascii():
        # Among these are signs that are digits and no numbers.
        raise UserError(
            f"--labels {labels!r} names no labels: give balanced, uniform or numbers such as 0,1,2."
        )
    return str(label) if label is not None else labels


def generate_command(request: GenerateRequest, places: Places, as_json: bool) -> None:
    """Make the images that are missing, and print where they are."""
    place = request.out.removeprefix("file://")
    if "://" not in place:
        require_writable_folder("--out", Path(place).expanduser())
    project = find_project(places.storage)
    from soflow_platform.cluster.connection import require_answer
    from soflow_platform.jobs.generate import generate
    from soflow_platform.tracking.store import TrackingStore

    require_answer(places.address)
    quiet_libraries()
    store = TrackingStore(places.tracking or project.tracking_uri)
    with image_progress("images") as report, stdout_to_stderr():
        result = generate(request, project, store, report)
    if as_json:
        print(json.dumps({**asdict(result), "images_per_second": result.images_per_second}, indent=1))
        return
    _print(result, request)


def _print(result: Generated, request: GenerateRequest) -> None:
    out = request.out
    print(f"{result.made} images made, {result.kept} were there: {out}")
    if result.made:
        print(f"{result.images_per_second:.1f} images/s, {result.seconds:.1f} s, {result.parts} parts")
    recorded = "" if request.steps or request.sampling else f" ({RECORDED})"
    print(f"sampled in {sampling_text(result.steps, result.sampling)}{recorded}")
    if result.rejected:
        print(f"{result.rejected} rows left out: {out}/rejected.parquet")
    if result.grid is not None:
        print(f"grid: {out}/{result.grid}")


def verify_command(uri: str, as_json: bool) -> None:
    """Check a finished set, and list every damage. Raises JobError where there is one."""
    from soflow_platform.cluster.actor_pool import Progress
    from soflow_platform.generation.finished_set import verify

    with image_progress("verifying") as report:
        images, damages = verify(uri, lambda done, total: report(Progress(done, total)))
    if as_json:
        print(json.dumps({"uri": uri, "images": images, "damages": damages}, indent=1))
    else:
        for damage in damages[:NAMED_DAMAGES]:
            print(damage)
        if len(damages) > NAMED_DAMAGES:
            print(f"and {len(damages) - NAMED_DAMAGES} more")
    if damages:
        raise JobError(
            f"{uri}: {len(damages)} damages; the same `soflowctl generate` makes files that are missing."
        )
    if not as_json:
        print(f"{uri}: {images} images are as they were written, each index once.")
