"""soflowctl models: lists what is registered."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Annotated

import typer

from soflow_core.failures import printable
from soflow_platform.cli.options import StorageOption, TrackingOption
from soflow_platform.cli.terminal import console, plain_table
from soflow_platform.errors import UserError
from soflow_platform.storage.project import find_project


def models(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="One registered model; default: all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the versions as JSON.")] = False,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """List registered models: versions, aliases, scores, method, size of the network, training images."""
    models_command(model, as_json, storage, tracking)


def models_command(
    model: str | None, as_json: bool, storage_option: str | None, tracking: str | None
) -> None:
    """Print all versions with their aliases and scores. Raises UserError where there are none."""
    project = find_project(storage_option)
    from soflow_platform.registry.version_list import list_versions
    from soflow_platform.tracking.store import TrackingStore

    store = TrackingStore(tracking or project.tracking_uri)
    name = re.split("[@/]", model.removeprefix("models:/"))[0] if model else None
    versions = list_versions(store, name) if store.exists() else []
    if as_json:
        print(json.dumps([asdict(version) for version in versions], indent=1))
        return
    if not versions:
        what = f"model {name!r}" if name else "model"
        raise UserError(
            f"there is no registered {what} in {store.uri}: `soflowctl run` registers the best trial of a sweep."
        )
    table = plain_table(
        "model", "version", "aliases", "score", "method", "network", "parameters", "images", "from"
    )
    for each in versions:
        cells = (
            each.model,
            each.version,
            ", ".join(each.aliases) or "-",
            "-" if each.score is None else f"{each.metric} {each.score:.4g}",
            each.method or "-",
            each.network or "-",
            "-" if each.parameters is None else f"{each.parameters:,}",
            "-" if each.images is None else f"{each.images:,}",
            "/".join(part for part in (each.sweep, each.trial) if part) or "-",
        )
        table.add_row(*(printable(cell) for cell in cells))
    console().print(table)
