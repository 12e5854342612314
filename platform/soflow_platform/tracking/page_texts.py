"""Markdown that MLflow's pages show of runs and versions: the newest sample grids of a run, and links to other pages.

MLflow's own image chart lists all parameters of a run above each picture, which leaves none of it in sight.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from soflow_platform.tracking.links import artifact_content, artifact_page

if TYPE_CHECKING:
    from mlflow import MlflowClient

NOTE_TAG = "mlflow.note.content"
"""A run's description."""
GRIDS_TITLE = "## Samples"
"""Beginning of a description that is kept up to date; one that begins otherwise has been written by somebody."""
IMAGES = "images"
"""Folder of a run's artifacts in which MLflow keeps series of images."""

_IMAGE = re.compile(r"samples~nfe(?P<nfe>\d+)\+step\+(?P<step>\d+)\+timestamp\+.*\.png")


def grids_text(client: MlflowClient, run: str) -> str:
    """Markdown with the newest sample grid for each number of network evaluations; empty where a run has none.

    The pictures are addressed relative to the tracking server's page.
    """
    newest: dict[int, tuple[int, str]] = {}
    for item in client.list_artifacts(run, IMAGES):
        match = _IMAGE.fullmatch(item.path.rsplit("/", 1)[-1])
        if match is not None:
            found = (int(match["step"]), item.path)
            newest[int(match["nfe"])] = max(found, newest.get(int(match["nfe"]), found))
    if not newest:
        return ""
    return f"{GRIDS_TITLE}\n\n" + "\n\n".join(
        f"NFE {nfe}, step {step:,}\n\n![NFE {nfe}, step {step}]({artifact_content(run, path)})"
        for nfe, (step, path) in sorted(newest.items())
    )


def show_grids(client: MlflowClient, run: str) -> None:
    """Put a run's newest sample grids into its description, unless that has been written by somebody."""
    present = client.get_run(run).data.tags.get(NOTE_TAG, "")
    text = grids_text(client, run)
    if text and text != present and (not present or present.startswith(GRIDS_TITLE)):
        client.set_tag(run, NOTE_TAG, text)


def link_artifact(client: MlflowClient, run: str, title: str, path: str) -> None:
    """Add a link to an artifact's page to a run's description, once."""
    found = client.get_run(run)
    text = found.data.tags.get(NOTE_TAG, "")
    link = f"[{title}]({artifact_page(found.info.experiment_id, run, path)})"
    if link not in text:
        client.set_tag(run, NOTE_TAG, f"{text}\n\n{link}".strip())
