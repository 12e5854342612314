"""soflowctl generate."""

from __future__ import annotations

from soflow_platform.cli.terminal import progress_bar
from soflow_platform.jobs.requests import GenerateRequest
from soflow_platform.storage.project import ProjectFolder, find_project, require_writable


def generate_command(request: GenerateRequest, storage: str | None, tracking: str | None) -> None:
    """Make the images that are missing from the output folder, and print where they are."""
    require_writable(ProjectFolder(request.out.absolute()))
    project = find_project(storage)
    from soflow_platform.jobs.generate import generate
    from soflow_platform.tracking.store import TrackingStore

    store = TrackingStore(tracking or project.tracking_uri)
    with progress_bar("images") as report:
        result = generate(request, project, store, report)
    print(f"{result.made} images made, {result.kept} were there: {request.out}")
    print(f"grid: {result.grid}")
