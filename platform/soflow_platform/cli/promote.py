"""soflowctl promote: changes the champion of a registered model."""

from __future__ import annotations

import json
import math
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from soflow_platform.cli.options import (
    MOST_IMAGES,
    AddressOption,
    Places,
    StorageOption,
    TrackingOption,
    refuse_together,
)
from soflow_platform.cli.terminal import (
    console,
    plain_table,
    progress_bar,
    quiet_libraries,
    stdout_to_stderr,
    storage_flag,
    tracking_flag,
)
from soflow_platform.errors import JobError, UserError
from soflow_platform.storage.project import ProjectFolder, find_project, require_writable

if TYPE_CHECKING:
    from soflow_platform.jobs.promote import Outcome
    from soflow_platform.jobs.requests import PromoteRequest
    from soflow_platform.registry.gate import Comparison
    from soflow_platform.registry.promotion import Promotion


def promote(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|SWEEP/TRIAL",
            help="models:/NAME@candidate, models:/NAME/3, or NAME; a trial is registered first.",
        ),
    ],
    samples: Annotated[
        int | None,
        typer.Option(
            min=16,
            max=MOST_IMAGES,
            help="Samples for each seed; default and least: those of the sweep's evaluation.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="URI", help="Real images; default: the data of the candidate's training."),
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(
            metavar="ID|PATH",
            help="Decodes latents; default: that of the sweep's evaluation, or the one they were made with.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Score both and say what would be done; nothing is changed.")
    ] = False,
    force: Annotated[
        str | None, typer.Option(metavar="REASON", help="Promote without scoring; the reason is kept.")
    ] = None,
    reuse_scores: Annotated[
        bool,
        typer.Option(
            "--reuse-scores", help="Compare the scores of the training, where both were taken in one way."
        ),
    ] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Restore the champion before this one.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as JSON.")] = False,
    address: AddressOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Make a version the champion, if it is better than the present one under one protocol by more than the metric's noise.

    A refusal is exit code 1.
    """
    places = Places(address, storage, tracking)
    scoring = {"--samples": samples, "--reference": reference, "--autoencoder": autoencoder}
    if rollback:
        others = {"--dry-run": dry_run, "--force": force, "--reuse-scores": reuse_scores, "--json": as_json}
        refuse_together({**others, **scoring, "--address": address}, "--rollback")
        return rollback_command(model, places)
    if force is not None:
        refuse_together({"--reuse-scores": reuse_scores, **scoring}, "--force")
    if reuse_scores:
        refuse_together(scoring, "--reuse-scores")
    from soflow_platform.jobs.requests import PromoteRequest

    request = PromoteRequest(model, samples, reference, autoencoder, force, reuse_scores, dry_run)
    return promote_command(request, places, as_json)


def promote_command(request: PromoteRequest, places: Places, as_json: bool) -> None:
    """Score, decide, and change the champion where the candidate passes. Raises JobError where the gate refuses it."""
    if request.force is not None and not request.force.strip():
        raise UserError("--force needs a reason: it is kept with the version.")
    project = find_project(places.storage)
    from soflow_platform.jobs.targets import require_registry
    from soflow_platform.tracking.store import TrackingStore

    store = TrackingStore(places.tracking or project.tracking_uri)
    require_registry(project, store)
    require_writable(project)
    from soflow_platform.cluster.connection import require_answer
    from soflow_platform.evaluation.runner import RayStatisticsRunner
    from soflow_platform.jobs.evaluate import Services
    from soflow_platform.jobs.promote import promote

    require_answer(places.address)
    quiet_libraries()
    with (
        progress_bar("images") as report,
        stdout_to_stderr(),
        RayStatisticsRunner(project, places.address, report) as runner,
    ):
        outcome = promote(request, Services(project, store, runner))
    if as_json:
        print(json.dumps(as_record(outcome), indent=1))
    else:
        _print_outcome(outcome, _flags(project, places))
    if outcome.decision.kind == "refused":
        against = outcome.decision.against
        kept = f"version {against} stays champion" if against else "there is still no champion"
        raise JobError(f"{outcome.candidate} is refused: {outcome.decision.reason}; {kept}.")


def rollback_command(model: str, places: Places) -> None:
    """Restore the champion before the present one, and say so."""
    project = find_project(places.storage)
    from soflow_platform.jobs.targets import require_registry
    from soflow_platform.registry.promotion import Champions
    from soflow_platform.registry.versions import find_version, parse_model
    from soflow_platform.tracking.store import TrackingStore

    store = TrackingStore(places.tracking or project.tracking_uri)
    require_registry(project, store)
    name = parse_model(model)[0]
    find_version(store, f"{name}@champion")
    _print_promotion(Champions(store, project, name).rollback(), _flags(project, places))


def as_record(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON data."""
    return {
        "model": outcome.model,
        "candidate": outcome.candidate,
        "decision": outcome.decision.kind,
        "reason": outcome.decision.reason,
        "against": outcome.decision.against,
        "changed": outcome.promotion is not None,
        **outcome.decision.numbers,
    }


def _flags(project: ProjectFolder, places: Places) -> str:
    """What the next command needs to find the same project folder and store."""
    return storage_flag(project) + tracking_flag(project, places.tracking)


def _print_outcome(outcome: Outcome, flags: str) -> None:
    screen = console()
    if outcome.comparisons:
        numbers = outcome.decision.numbers
        table = plain_table("metric", "candidate", "champion", "better by", "noise", "")
        for each in outcome.comparisons:
            table.add_row(each.name, *_cells(each))
        screen.print(table)
        seeds = numbers["seeds"]
        screen.print(
            f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]}) of {numbers['samples']} samples, NFE {numbers['nfe']}, labels "
            f"{numbers['labels']}; noise: what the mean differs by chance with {numbers['confidence']:.0%}",
            highlight=False,
        )
    for flag in outcome.flags:
        screen.print(f"note: {flag}", highlight=False)
    if outcome.promotion is not None:
        _print_promotion(outcome.promotion, flags)
    elif outcome.decision.kind != "refused":
        print(f"{outcome.candidate} would become champion of {outcome.model}: {outcome.decision.reason}")


def _cells(comparison: Comparison) -> list[str]:
    champion = comparison.champion_value
    verdict = "refused" if comparison.refusal is not None else "passed"
    return [
        f"{comparison.value:.5g}",
        "-" if champion is None else f"{champion:.5g}",
        "-" if math.isnan(comparison.gain) else f"{comparison.gain:+.3g}",
        "-" if math.isnan(comparison.noise) else f"{comparison.noise:.2g}",
        verdict if comparison.guard is None else f"guard {verdict}",
    ]


def _print_promotion(done: Promotion, flags: str) -> None:
    before = f" (before: version {done.previous})" if done.previous else ""
    print(f"models:/{done.model}@champion is version {done.version}{before}: {done.reason}")
    champion = shlex.quote(f"models:/{done.model}@champion")
    print(f"next: soflowctl generate --model {champion} --num 100 --out images{flags}")
