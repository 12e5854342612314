"""soflowctl doctor: a line for each thing that a sweep needs, with what to do where it is wrong."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from soflow_core.failures import printable
from soflow_platform.cli.options import AddressOption, SetOption, StorageOption, TrackingOption

if TYPE_CHECKING:
    from soflow_platform.jobs.doctor import Check


def doctor(
    sweep: Annotated[
        str | None,
        typer.Argument(
            metavar="[SWEEP]", help="A sweep file or name, whose data and weights are looked at too."
        ),
    ] = None,
    overrides: SetOption = None,
    address: AddressOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
    nodes: Annotated[
        int,
        typer.Option(min=1, help="With --address: nodes that the cluster must have; they are waited for."),
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check that this machine, or every node of a cluster, can run sweeps; exit code 1 where something is wrong.

    The environment is that of `soflowctl run`: MLFLOW_TRACKING_URI is not read, tracking.uri of the sweep or --tracking is.
    """
    from soflow_platform.cli.sweep_file import read
    from soflow_platform.cli.terminal import stdout_to_stderr
    from soflow_platform.config.locations import absolute_tracking
    from soflow_platform.errors import UserError
    from soflow_platform.jobs.doctor import DoctorRequest, State, diagnose
    from soflow_platform.storage.project import find_project

    project = find_project(storage)
    experiment = read(sweep, tuple(overrides or ())).experiment if sweep else None
    if overrides and not sweep:
        raise UserError("--set changes a sweep: name the sweep, or leave --set out.")
    if nodes > 1 and address is None:
        raise UserError("--nodes counts the nodes of --address: pass that too, or leave it out.")
    uri = tracking or (experiment.tracking.uri if experiment else None) or project.tracking_uri
    try:
        uri = absolute_tracking(uri)
    except ValueError as error:
        raise UserError(f"--tracking: {error}.") from None
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    checks: list[Check] = []
    request = DoctorRequest(address, project, uri, experiment, nodes)
    with stdout_to_stderr():
        for check in diagnose(request):
            checks.append(check)
            if not as_json:
                _print(check)
    if as_json:
        fields = ({"check": c.name, "state": c.state.value, "text": c.text, "mend": c.mend} for c in checks)
        print(json.dumps(list(fields), indent=1))
    wrong = sum(check.state is State.wrong for check in checks)
    if wrong and not as_json:
        print(f"{wrong} of {len(checks)} checks are wrong.")
    if wrong:
        raise typer.Exit(1)


def _print(check: Check) -> None:
    line = f"{check.state.value:8}{check.name:15}{check.text}"
    # Ray's messages about lost workers go to stderr meanwhile; this is the result.
    print(printable(line + (f"; {check.mend}" if check.mend else "")), file=sys.__stdout__, flush=True)
