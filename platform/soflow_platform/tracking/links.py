"""URLs of pages of MLflow's web interface, and of what they show."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Sequence
from typing import Any

from soflow_platform.tracking.store import PARENT_TAG

LOCAL_ADDRESS = "http://127.0.0.1:5000"
"""Where `soflowctl ui` serves the web interface."""


def sweep_page(
    experiment_id: str, run: str, metric: str, address: str = LOCAL_ADDRESS, view: bool = False
) -> str:
    """URL of the page with the trials of a sweep (`run` is its MLflow run): sorted by `metric`.

    With a `view`, which `view_state` describes, it is the table with what varies as columns; else the curves.
    """
    page = {"workflowType": "machine_learning", "compareRunsMode": "TABLE" if view else "CHART"}
    facets = _facets(run, metric, True) | {"orderByAsc": "true"}
    state = {"viewStateShareKey": run} if view else facets
    return f"{address}/#/experiments/{experiment_id}/runs?{urllib.parse.urlencode(state | page)}"


def artifact_page(experiment_id: str, run: str, path: str) -> str:
    """URL of the page that shows an artifact of a run, relative to that of the tracking server."""
    return f"#/experiments/{experiment_id}/runs/{run}/artifacts/{urllib.parse.quote(path)}"


def artifact_content(run: str, path: str) -> str:
    """URL of the content of an artifact of a run, relative to the page of the tracking server."""
    return "get-artifact?" + urllib.parse.urlencode({"path": path, "run_uuid": run})


def view_state(run: str, metric: str, ascending: bool, params: Sequence[str], metrics: Sequence[str]) -> str:
    """State of MLflow's page for a sweep: its trials, the best first, with the varied params and the scores as columns."""
    columns = [*(f"metrics.`{name}`" for name in metrics), *(f"params.`{name}`" for name in params)]
    return json.dumps({**_facets(run, metric, ascending), "selectedColumns": columns, "columnOrder": columns})


def _facets(run: str, metric: str, ascending: bool) -> dict[str, Any]:
    """Which runs the page shows, and in which order."""
    return {
        "searchFilter": f"tags.`{PARENT_TAG}` = '{run}'",
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": ascending,
    }
