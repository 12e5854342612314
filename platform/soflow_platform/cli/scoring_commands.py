"""evaluate and compare: the options of the commands that score."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from soflow_platform.cli.options import (
    AddressOption,
    GridOption,
    GuidanceOption,
    Places,
    SamplerOption,
    SetOption,
    StorageOption,
    TimesOption,
    TrackingOption,
    parse_sampling,
)


class LabelMode(str, Enum):
    """How the labels of scored images are chosen."""

    uniform = "uniform"
    balanced = "balanced"


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RUN|CHECKPOINT|FOLDER|NPZ",
            help="models:/NAME@ALIAS, a sweep, SWEEP/TRIAL or MLflow run, a checkpoint folder or .safetensors file, "
            "a folder of images, an .npz file of samples, or a shard set.",
        ),
    ],
    metrics: Annotated[
        str | None,
        typer.Option(help="fid, sfid, is, kid, precision, recall, fd, label_agreement; several with commas."),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(
            min=2, help="Number of images; default 50,000 of a network, or all of a folder or file."
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Numbers of sampling steps, each scored, such as 1,2,4; default 1, or those of --times."
        ),
    ] = None,
    labels: Annotated[
        LabelMode, typer.Option(help="Labels drawn for each image, or every class in turn.")
    ] = LabelMode.uniform,
    seed: Annotated[int, typer.Option(help="Image i is a function of the seed, i and its label.")] = 0,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="inception, dinov2, clip, digits-classifier, pooled or file:PATH; default inception, for digits their classifier.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Real images: a shard set, a folder, or ADM's .npz; default: the data of the training.",
        ),
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="ID|PATH", help="Decodes latents; default is the one they were made with."),
    ] = None,
    sampler: SamplerOption = None,
    guidance: GuidanceOption = None,
    times: TimesOption = None,
    grid: GridOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    address: AddressOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Score the images of a network, or images in a folder or file: FID and other metrics, with the settings that decide them.

    The same command goes on where an interrupted one stopped.
    """
    from soflow_platform.cli.evaluate import evaluate_command, parse_list, parse_steps
    from soflow_platform.jobs.requests import EvaluateRequest, ProtocolRequest, SamplingRequest

    settings, numbers = parse_sampling(
        sampler, guidance, times, grid, None if steps is None else parse_steps(steps)
    )
    request = EvaluateRequest(
        target=target,
        num=num,
        sampling=SamplingRequest(
            steps=numbers,
            labels=labels.value,
            seed=seed,
            settings=settings,
        ),
        protocol=ProtocolRequest(
            metrics=parse_list("--metrics", metrics) if metrics is not None else (),
            features=features,
            reference=reference,
            autoencoder=autoencoder,
        ),
    )
    evaluate_command(request, Places(address, storage, tracking), as_json)


def compare(
    sweeps: Annotated[
        list[str],
        typer.Argument(
            metavar="SWEEP...",
            help="Id or name of a sweep that ran, or its file, whose `comparison` section is then used; several stand in one table.",
        ),
    ],
    overrides: SetOption = None,
    costs: Annotated[
        bool,
        typer.Option("--costs/--no-costs", help="Measure seconds and memory of each method on this machine."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    address: AddressOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Compare the methods of one sweep or of several: distance at each number of function evaluations, costs of steps and images."""
    from soflow_platform.cli.compare import compare_command

    places = Places(address, storage, tracking)
    compare_command(tuple(sweeps), tuple(overrides or ()), places, costs, as_json)
