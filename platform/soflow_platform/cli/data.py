"""`soflowctl data`: prepares, shows and verifies shard sets."""

from __future__ import annotations

import itertools
import shlex
from collections import Counter
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from soflow_core.failures import printable
from soflow_pipelines.images.limits import DEFAULT_LIMITS, ImageLimits
from soflow_platform.cli.options import AddressOption
from soflow_platform.cli.terminal import progress_bar, quiet_libraries
from soflow_platform.errors import JobError, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from soflow_pipelines.shards.info import DatasetInfo
    from soflow_platform.jobs.prepare import Prepared, PrepareRequest

app = typer.Typer(
    name="data", help="Make, look at and check the shard sets that networks train on.", no_args_is_help=True
)

UriArgument = Annotated[
    str, typer.Argument(metavar="URI", help="A shard set: a folder, s3://bucket/prefix or https://host/path.")
]
LISTED = 200
"""Classes that `inspect` lists."""


def _echo(text: str) -> None:
    """Prints a line; what it holds of names from outside is escaped."""
    typer.echo(printable(text))


class LatentType(str, Enum):
    """How latents are stored."""

    float16 = "float16"
    float32 = "float32"


@app.command()
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="An image folder, ImageNet's tree, a zip of one, Parquet, WebDataset shards, HDF5 latents (FILE.h5), "
            "a set that `soflowctl generate` made, `digits` or `cifar10:PATH`.",
        ),
    ],
    out: Annotated[
        str, typer.Option(metavar="URI", help="Where the shards go: a folder or s3://bucket/prefix.")
    ],
    autoencoder: Annotated[
        str,
        typer.Option(
            metavar="ID|PATH|none",
            help="Store latents of this AutoencoderKL: a hub id or a folder; or KIND:PLACE of another registered kind.",
        ),
    ] = "none",
    resolution: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the images in pixels; default 256, or the source's own."),
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of a source that has several.")] = "train",
    flips: Annotated[
        bool, typer.Option("--flips", help="Add each image mirrored, before it is encoded.")
    ] = False,
    dtype: Annotated[LatentType, typer.Option(help="How latents are stored.")] = LatentType.float16,
    seed: Annotated[int, typer.Option(min=0, help="Of the order in which images fill the shards.")] = 0,
    shard_mb: Annotated[int, typer.Option("--shard-mb", min=1, help="Size of a shard.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 32,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Leave damaged images out, and name them.")
    ] = False,
    image_column: Annotated[
        str | None, typer.Option(help="Of Parquet; default: the first of images.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Of Parquet; default: label, or the one that is called like it.")
    ] = None,
    image_key: Annotated[
        str | None,
        typer.Option(metavar="EXT", help="Of WebDataset tars: extension of the images, as input.jpg."),
    ] = None,
    label_key: Annotated[
        str | None,
        typer.Option(
            metavar="EXT", help="Of WebDataset tars: extension of the labels, as target.cls or json:FIELD."
        ),
    ] = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="Leave labels aside.")] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Follow links that lead out of an image folder.")
    ] = False,
    max_megapixels: Annotated[
        int, typer.Option(min=1, help="Millions of pixels beyond which an image counts as damaged.")
    ] = DEFAULT_LIMITS.megapixels,
    max_file_mb: Annotated[
        int, typer.Option(min=1, help="MiB of an image's file, unpacked, beyond which it counts as damaged.")
    ] = DEFAULT_LIMITS.file_megabytes,
    max_ratio: Annotated[
        int, typer.Option(min=1, help="Longer side by shorter side beyond which an image counts as damaged.")
    ] = DEFAULT_LIMITS.ratio,
    max_growth: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many times its size a zip file's member may unpack to, else it counts as damaged.",
        ),
    ] = DEFAULT_LIMITS.growth,
    address: AddressOption = None,
) -> None:
    """Turn images into a shard set, of pixels or of latents.

    The same command resumes a preparation that was interrupted; its shards are the same to the last byte.
    """
    from soflow_pipelines.sources.opening import SourceOptions
    from soflow_platform.jobs.prepare import PrepareRequest

    request = PrepareRequest(
        source=source,
        out=out,
        resolution=resolution,
        autoencoder=None if autoencoder == "none" else autoencoder,
        flips=flips,
        dtype=dtype.value,
        seed=seed,
        shard_megabytes=shard_mb,
        batch=batch,
        skip_damaged=skip_damaged,
        options=SourceOptions(
            split=split,
            image_column=image_column,
            label_column=label_column,
            image_key=image_key,
            label_key=label_key,
            unlabelled=unlabelled,
            follow_links=follow_links,
            limits=ImageLimits(max_megapixels, max_file_mb, max_ratio, max_growth),
        ),
    )
    quiet_libraries()
    done = _with_progress(request, address)
    _print_prepared(done, out, request.autoencoder)


def _with_progress(request: PrepareRequest, address: str | None) -> Prepared:
    from soflow_platform.jobs.prepare import prepare

    what = "encoding" if request.autoencoder else "preparing"
    with progress_bar(what, waiting="listing the source") as report:
        return prepare(request, address, report)


def _print_prepared(done: Prepared, out: str, autoencoder: str | None) -> None:
    info = done.info
    what = f"{done.built} shards written" if done.built else "complete already, nothing was done"
    _echo(f"{out}: {what}.")
    _echo(
        f"{info.samples} samples of {info.kind}, {' x '.join(map(str, info.shape))}, {info.classes or 'no'} classes, "
        f"{info.shards} shards, {info.bytes / 1e6:.1f} MB, sha256:{info.short_digest(12)}"
    )
    if done.label_origin is None:
        _echo("no labels: the images have no classes, and a network trained on them is unconditional")
    else:
        _echo(f"labels from {done.label_origin}")
    if done.passed_over:
        _echo(f"{done.passed_over} files passed over: no images, hidden, or leftovers of another system")
    for name in info.left_out:
        _echo(f"left out: {name}")
    # A folder's name alone does not say where it is, and sample grids are decoded by what is in it.
    decoder = (
        f" --set {shlex.quote(f'evaluation.autoencoder={autoencoder}')}"
        if autoencoder and Path(autoencoder).is_dir()
        else ""
    )
    source = shlex.quote(f"data.source={out}")
    _echo(
        f"Train on it with --set {source}{decoder}, look at it with: soflowctl data inspect {shlex.quote(out)}"
    )


@app.command()
def inspect(
    uri: UriArgument,
    sheet: Annotated[
        Path | None,
        typer.Option("--sheet", metavar="FILE", help="Write a contact sheet of images as PNG here."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many images the sheet shows.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Which images: another seed, others.")] = 0,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="ID|PATH", help="Decodes latents; default is the one they were made with."),
    ] = None,
) -> None:
    """Show what a shard set holds, and its images as a contact sheet."""
    from soflow_pipelines.shards.tables import read_info, read_manifest

    info, records = read_info(uri), read_manifest(uri)
    _print_info(uri, info)
    counts: Counter[int] = Counter()
    for record in records:
        counts.update(record.label_counts)
    _print_classes(info, counts)
    if sheet is not None:
        pictures = _preview(uri, info, images, seed, autoencoder)
        _write_sheet(pictures, sheet)


def _print_info(uri: str, info: DatasetInfo) -> None:
    stored = " x ".join(map(str, info.stored_shape))
    _echo(f"{uri}: {info.samples} samples, {info.shards} shards, {info.bytes / 1e6:.1f} MB")
    _echo(f"{info.kind}: {' x '.join(map(str, info.shape))} for the network, stored as {info.dtype} {stored}")
    if info.kind == "latents":
        _echo(
            f"autoencoder {info.autoencoder} (weights {info.autoencoder_digest}), scaling {info.scaling:g}, "
            f"shift {info.shift:g}, from {info.resolution} x {info.resolution} pixels"
        )
    _echo(f"crop {info.crop or 'none'}, flips {'yes' if info.flips else 'no'}, {info.digest}")
    for name in info.left_out:
        _echo(f"left out: {name}")


def _print_classes(info: DatasetInfo, counts: Counter[int]) -> None:
    if info.classes is None:
        _echo("no classes")
        return
    sizes = [counts[label] for label in range(info.classes)]
    empty = sizes.count(0)
    _echo(
        f"{info.classes} classes of {min(sizes)} to {max(sizes)} samples"
        + (f", {empty} empty" if empty else "")
    )
    shown = [label for label in range(info.classes) if sizes[label]][:LISTED]
    for label in shown:
        name = info.class_names[label] if info.class_names else ""
        _echo(f"{label:6d} {sizes[label]:8d}  {name}")
    rest = sum(1 for size in sizes if size) - len(shown)
    if rest:
        _echo(f"       and {rest} more")


def _preview(
    uri: str, info: DatasetInfo, count: int, seed: int, autoencoder: str | None
) -> NDArray[np.uint8]:
    """Images of a set, decoded where it holds latents. Raises UserError where its autoencoder cannot be loaded."""
    from soflow_pipelines.images.autoencoder import load_autoencoder
    from soflow_pipelines.images.codec import AutoencoderError
    from soflow_pipelines.shards.preview import sample_images

    decoder = None
    if info.kind == "latents":
        quiet_libraries()
        try:
            decoder = load_autoencoder(autoencoder or info.autoencoder or "")
        except AutoencoderError as error:
            raise UserError(f"{error} Name the folder with --autoencoder.") from error
        if decoder.facts.digest != info.autoencoder_digest:
            raise UserError(
                f"{uri} holds latents of {info.autoencoder} ({info.autoencoder_digest}), the autoencoder given is "
                f"{decoder.facts.id} ({decoder.facts.digest})."
            )
    pictures, _ = sample_images(uri, count, seed, decoder)
    return pictures


def _write_sheet(pictures: NDArray[np.uint8], sheet: Path) -> None:
    """Writes images as one PNG, small ones enlarged. Raises UserError where the file cannot be written."""
    from soflow_pipelines.images.encode import encode_png, image_grid
    from soflow_pipelines.storage.files import write_bytes

    columns = max(1, round(len(pictures) ** 0.5))
    grid = image_grid(pictures, columns=columns, enlarge=max(1, 64 // pictures.shape[-1]))
    try:
        write_bytes(sheet, encode_png(grid))
    except OSError as error:
        raise UserError(f"{sheet} cannot be written: {error.strerror}.") from error
    _echo(f"contact sheet of {len(pictures)} images: {sheet}")


@app.command()
def verify(
    uri: UriArgument,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Shards read at once; default: one for each core.")
    ] = None,
) -> None:
    """Read a shard set once, whole, and list every damage with shard and key. Exit code 1 where there is one."""
    from soflow_pipelines.shards.tables import read_info
    from soflow_pipelines.shards.verify import verify as find_damages
    from soflow_platform.cluster.actor_pool import Progress

    info = read_info(uri)
    checked = itertools.count(1)
    with progress_bar("verifying") as report:
        damages = find_damages(uri, threads, lambda _: report(Progress(next(checked), info.shards)))
    for damage in damages:
        _echo(str(damage))
    if damages:
        raise JobError(f"{uri}: {len(damages)} damages in {len({damage.file for damage in damages})} files.")
    _echo(f"{uri}: {info.samples} samples in {info.shards} shards are as they were written.")
