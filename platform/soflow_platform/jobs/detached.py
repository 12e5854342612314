"""A sweep whose command runs on the cluster, as a Ray job: submitted here, found again through the project folder.

`sweeps/<sweep>/job.json` says which job it is, `output.txt` beside it has what its command prints, and `exit.json` how it ended.
The job runs `python -m soflow_platform.cli.detached_command FOLDER run FILE ...`.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from soflow_core.failures import summarize
from soflow_pipelines.storage.files import write_bytes, write_json
from soflow_platform.errors import JobError, UserError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.storage.records import read_record

JOB, OUTPUT, EXIT, SETTINGS = "job.json", "output.txt", "exit.json", "detached.yaml"
"""Files in the folder of a sweep."""
ENTRY = "soflow_platform.cli.detached_command"
"""Module that the job runs: it imports this one."""
NO_AGENT = "No available agent"
"""In Ray's error where the process that starts jobs on the head is not there yet."""
AGENT_SECONDS = 60.0
"""How long it may take to come."""
BEGIN_SECONDS = 180.0
"""How long a submitted job may take to begin before it counts as lost."""


@dataclass(frozen=True)
class DetachedJob:
    """`job.json`."""

    job: str
    """Ray's submission id."""
    address: str
    """HOST:PORT of the cluster."""
    submitted: float = 0.0
    """Seconds since 1970."""


@dataclass(frozen=True)
class Ended:
    """`exit.json`."""

    code: int
    """Exit code of the command."""
    at: float = 0.0
    """Seconds since 1970."""


def job_of(project: ProjectFolder, sweep: str) -> DetachedJob | None:
    """The job that a sweep was submitted as; None where it never was."""
    return read_record(project.sweep(sweep) / JOB, DetachedJob)


def end_of(project: ProjectFolder, sweep: str) -> Ended | None:
    """How the command of a submitted sweep ended; None while it runs, and where it was killed."""
    return read_record(project.sweep(sweep) / EXIT, Ended)


def submit(
    project: ProjectFolder, sweep: str, settings: str, options: Sequence[str], address: str
) -> DetachedJob:
    """Submit the command of a sweep to the cluster at HOST:PORT. `settings` are its settings in full, as YAML.

    Raises JobError where the cluster's head takes no jobs.
    """
    from ray.job_submission import JobSubmissionClient

    from soflow_platform.cluster.code_shipping import shipped_code, with_plugins

    folder = project.sweep(sweep)
    write_bytes(folder / SETTINGS, settings.encode())
    for name in (EXIT, OUTPUT):
        (folder / name).unlink(missing_ok=True)
    command = ["run", str(folder / SETTINGS), "--storage", str(project.root), "--address", address, *options]
    entry = ["python", "-m", ENTRY, str(folder), *command]
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # It says of every package whether it is uploaded.
    logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address)
        with shipped_code() as environment:
            # No variables of this process: Ray's logs and page would show what is secret in them.
            job = _patiently(
                lambda: client.submit_job(entrypoint=shlex.join(entry), runtime_env=with_plugins(environment))
            )
    except Exception as error:
        raise JobError(
            f"the cluster at {address} takes no jobs ({summarize(error)[:300]}): its head must run the dashboard, which "
            "`ray start --head` starts where ray[default] is installed, and this machine must reach it."
        ) from error
    found = DetachedJob(job, address, time.time())
    write_json(folder / JOB, vars(found))
    return found


def _patiently(submit_job: Callable[[], str]) -> str:
    """Submit, again where the head's agent has not answered yet: a head that has just started takes jobs after some seconds."""
    end = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return submit_job()
        except RuntimeError as error:
            if NO_AGENT not in str(error) or time.monotonic() > end:
                raise
        time.sleep(1.0)


def state_of(found: DetachedJob) -> str | None:
    """Ray's state of a job: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; None where the cluster does not tell."""
    from soflow_platform.cluster.connection import require_answer

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        # Ray's client tries for most of a minute to reach a head that is gone.
        require_answer(found.address)
        from ray.job_submission import JobSubmissionClient

        return str(JobSubmissionClient(found.address).get_job_status(found.job).value)
    except Exception:
        # Without the cluster the files say how far it is.
        return None


def require_same_from_everywhere(source: str | None) -> None:
    """Raises UserError where data are named by a path that depends on the working folder."""
    if source is None or "://" in source or Path(source).is_absolute() or not Path(source).exists():
        return
    raise UserError(
        f"data.source {source} is a relative path, which is another one in the job: pass --set data.source={Path(source).absolute()}."
    )
