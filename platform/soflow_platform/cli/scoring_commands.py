"""evaluate and compare: the options of the commands that score."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from soflow_platform.cli.options import (
    MOST_IMAGES,
    MOST_SEEDS,
    AddressOption,
    GridOption,
    IntervalOption,
    Places,
    SamplerOption,
    SetOption,
    StorageOption,
    TimesOption,
    TrackingOption,
    check_seed,
    parse_sampling,
)
from soflow_platform.errors import UserError


class LabelMode(str, Enum):
    """How the labels of scored images are chosen."""

    uniform = "uniform"
    balanced = "balanced"
    both = "both"


GuidanceScalesOption = Annotated[
    str | None,
    typer.Option(
        "--guidance",
        metavar="SCALES",
        help="Guidance scales at sampling, each scored, such as 1,2,3, for methods that have one or are trained on a range of scales.",
    ),
]


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
            min=2,
            max=MOST_IMAGES,
            help="Number of images; default 50,000 of a network, or all of a folder or file.",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Numbers of sampling steps, each scored, such as 1,2,4; default those of --times, else sampling.steps of the sweep."
        ),
    ] = None,
    labels: Annotated[
        LabelMode, typer.Option(help="Labels drawn for each image, every class in turn, or a row for each.")
    ] = LabelMode.uniform,
    seed: Annotated[int, typer.Option(help="Image i is a function of the seed, i and its label.")] = 0,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_SEEDS,
            help="Score this many seeds, and show mean and standard deviation; default 1, with --search-steps 3.",
        ),
    ] = None,
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
    guidance: GuidanceScalesOption = None,
    interval: IntervalOption = None,
    times: TimesOption = None,
    grid: GridOption = None,
    search_steps: Annotated[
        bool,
        typer.Option(
            "--search-steps",
            help="Search the times at which the steps end, then score the best grid and the default one with other seeds.",
        ),
    ] = False,
    search_trials: Annotated[
        int | None,
        typer.Option(min=2, help="Grids that --search-steps tries at most, for each of --steps; default 32."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="Draw the scores against guidance, or against function evaluations."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    address: AddressOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Score the images of a network, or images in a folder or file: FID and other metrics, with the settings that decide them.

    The same command goes on where an interrupted one stopped.
    """
    from soflow_platform.cli.evaluate import (
        evaluate_command,
        parse_list,
        parse_scales,
        parse_steps,
        search_command,
        step_search,
    )
    from soflow_platform.jobs.requests import EvaluateRequest, ProtocolRequest, SamplingRequest

    check_seed(seed)
    scales = () if guidance is None else parse_scales(guidance)
    settings, numbers = parse_sampling(
        sampler,
        scales[0] if len(scales) == 1 else None,
        times,
        grid,
        None if steps is None else parse_steps(steps),
        interval,
    )
    search = step_search(search_trials, seeds, times, plot, scales) if search_steps else None
    if search is None and search_trials is not None:
        raise UserError("--search-trials is for --search-steps: leave it out.")
    request = EvaluateRequest(
        target=target,
        num=num,
        sampling=SamplingRequest(
            steps=numbers,
            labels=labels.value,
            seed=seed,
            seeds=seeds or 1,
            settings=settings,
            guidance=scales if len(scales) > 1 else (),
        ),
        protocol=ProtocolRequest(
            metrics=parse_list("--metrics", metrics) if metrics is not None else (),
            features=features,
            reference=reference,
            autoencoder=autoencoder,
            diversity=len(scales) > 1,
        ),
    )
    places = Places(address, storage, tracking)
    if search is None:
        evaluate_command(request, places, as_json, plot)
    else:
        search_command(request, search, places, as_json)


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
    markdown: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.md",
            help="A page in which the comparison is written, in the place of an earlier one of these sweeps or at its end.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Copy of the plot, which the page of --markdown shows."),
    ] = None,
    address: AddressOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Compare the methods of one sweep or of several: distance at each number of function evaluations, costs of steps and images."""
    from soflow_platform.cli.compare import CopiesRequest, compare_command

    places = Places(address, storage, tracking)
    copies = CopiesRequest(markdown, plot)
    compare_command(tuple(sweeps), tuple(overrides or ()), places, costs, as_json, copies)
