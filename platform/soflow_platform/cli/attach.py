"""soflowctl attach: what the command of a submitted sweep prints, from any machine that sees the project folder."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import BinaryIO

from soflow_platform.cli.terminal import storage_flag
from soflow_platform.errors import JobError, UserError
from soflow_platform.jobs.detached import BEGIN_SECONDS, OUTPUT, DetachedJob, end_of, job_of, state_of
from soflow_platform.storage.project import ProjectFolder, find_project
from soflow_platform.tuning.lookup import resolve
from soflow_platform.tuning.record import SweepRecord, load_record
from soflow_platform.tuning.status import sweep_runs

POLL_SECONDS = 0.5
LOST_SECONDS = 30.0
"""How long nothing of a job may be seen to run before its cluster is asked."""


def attach_command(name: str, storage_option: str | None) -> int:
    """Print the output of a submitted sweep from its beginning until it ends; returns the exit code of its command.

    Raises UserError where it was not submitted, JobError where its command was lost.
    """
    project = find_project(storage_option)
    record = resolve(project, name).record
    job = job_of(project, record.id)
    if job is None:
        name = f"{record.id}{storage_flag(project)}"
        raise UserError(
            f"sweep {record.id} was not submitted with --detach: see it with `soflowctl status {name}`, "
            f"and its trials with `soflowctl logs {name} --follow`."
        )
    print(f"sweep {record.id} is job {job.job} at {job.address}; Ctrl-C leaves it running.", file=sys.stderr)
    return _follow(project, record, job, project.sweep(record.id) / OUTPUT)


def _follow(project: ProjectFolder, record: SweepRecord, job: DetachedJob, path: Path) -> int:
    output: BinaryIO | None = None
    seen = time.monotonic()
    while True:
        # Before what is printed is read, so that all of it is.
        end = end_of(project, record.id)
        if output is None and path.exists():
            output = path.open("rb")
        printed = _pass_on(output)
        if end is not None:
            return end.code
        now = time.monotonic()
        if printed or sweep_runs(project, load_record(project, record.id) or record):
            seen = now
        if now - seen > (LOST_SECONDS if output is not None else BEGIN_SECONDS):
            state = state_of(job)
            if state not in ("PENDING", "RUNNING"):
                raise JobError(
                    f"the command of sweep {record.id} was lost (job {job.job} at {job.address}: {state or 'no answer'}): "
                    f"`soflowctl run` with --detach goes on with it."
                )
            seen = now
        time.sleep(POLL_SECONDS)


def _pass_on(output: BinaryIO | None) -> bool:
    """Print what is new; returns whether there was anything."""
    new = output.read() if output is not None else b""
    if new:
        sys.stdout.write(new.decode(errors="replace"))
        sys.stdout.flush()
    return bool(new)
