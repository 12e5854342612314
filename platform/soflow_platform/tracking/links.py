"""URLs of pages of MLflow's web interface."""

from __future__ import annotations

import urllib.parse

from soflow_platform.tracking.store import PARENT_TAG

LOCAL_ADDRESS = "http://127.0.0.1:5000"
"""Where `soflowctl ui` serves the web interface."""


def sweep_page(experiment_id: str, run: str, metric: str, address: str = LOCAL_ADDRESS) -> str:
    """URL of the page with the trials of a sweep (`run` is its MLflow run): sorted by `metric`, with their curves."""
    query = urllib.parse.urlencode(
        {
            "searchFilter": f"tags.`{PARENT_TAG}` = '{run}'",
            "orderByKey": f"metrics.`{metric}`",
            "orderByAsc": "true",
            "workflowType": "machine_learning",
            "compareRunsMode": "CHART",
        }
    )
    return f"{address}/#/experiments/{experiment_id}/runs?{query}"
