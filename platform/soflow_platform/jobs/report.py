"""Writes the report of a sweep: one HTML page, and the file that its commands start from; both are artifacts of the sweep's run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from soflow_core.failures import summarize
from soflow_pipelines.storage.files import write_bytes
from soflow_platform.jobs.report_data import base_settings, gather
from soflow_platform.jobs.report_page import page
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.page_texts import link_artifact
from soflow_platform.tracking.store import TrackingStore
from soflow_platform.tuning.record import SweepRecord

PAGE, BASE = "report.html", "reproduce.yaml"
ARTIFACTS = "report"
"""Folder of the artifacts of the sweep's run."""


@dataclass(frozen=True)
class WrittenReport:
    """Where a report was written, and why it is not among the artifacts, where it is not."""

    page: Path
    base: Path
    not_logged: str | None = None


def write_report(
    record: SweepRecord, project: ProjectFolder, store: TrackingStore, folder: Path | None = None
) -> WrittenReport:
    """Write the report of a sweep into a folder, the sweep's own where none is given, and log it on the sweep's run.

    A tracking store that does not answer keeps no report from being written.
    """
    place = (folder or project.sweep(record.id) / "report").resolve()
    base = place / BASE
    report = gather(record, project, store, str(base))
    settings = yaml.safe_dump(base_settings(record), sort_keys=False, allow_unicode=True)
    text = f"# The settings of {record.id} without its search space: `soflowctl run` of this file trains one trial.\n{settings}"
    write_bytes(base, text.encode())
    write_bytes(place / PAGE, page(report, text).encode())
    return WrittenReport(place / PAGE, base, _logged(record, store, [place / PAGE, base]))


def _logged(record: SweepRecord, store: TrackingStore, files: list[Path]) -> str | None:
    """Log files on the sweep's run; the reason where that is not possible."""
    if not record.run or not store.exists():
        return "the sweep has no run in MLflow"
    try:
        for file in files:
            store.client.log_artifact(record.run, str(file), ARTIFACTS)
        link_artifact(store.client, record.run, "Report", f"{ARTIFACTS}/{PAGE}")
    except Exception as error:
        return summarize(error)[:200]
    return None
