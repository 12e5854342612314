"""Requests to stop or to save: a file in the folder of a sweep or trial, which every machine of a cluster sees.

The training loop checks for them between steps. Workers finish their step, save a checkpoint and end; the same `soflowctl run` goes on.
"""

from __future__ import annotations

import os
import socket
import time

from soflow_pipelines.storage.files import write_json
from soflow_platform.storage.project import ProjectFolder

REQUEST = "stop.json"
"""Name of the file, in the folder of the sweep or of the trial that is to stop."""
SAVE = "save.json"
"""Name of the file, in the folder of a sweep whose running trials are to save and go on."""


def request_stop(storage: ProjectFolder, sweep: str, trial: str | None = None) -> None:
    """Request that a trial stops, or with None the whole sweep. A second request changes nothing."""
    folder = storage.sweep(sweep) if trial is None else storage.trial(sweep, trial)
    if not (folder / REQUEST).exists():
        write_json(
            folder / REQUEST, {"asked": time.time(), "host": socket.gethostname(), "user": os.getuid()}
        )


def stop_requested(storage: ProjectFolder, sweep: str, trial: str | None = None) -> bool:
    """Whether a stop of this trial or of its whole sweep is requested; with None, of the whole sweep.

    Costs one or two file system look-ups.
    """
    if (storage.sweep(sweep) / REQUEST).exists():
        return True
    return trial is not None and (storage.trial(sweep, trial) / REQUEST).exists()


def clear_stops(storage: ProjectFolder, sweep: str) -> None:
    """Remove the stop requests of a sweep and of its trials; called when the sweep is started again."""
    folder = storage.sweep(sweep)
    for path in (folder / REQUEST, *folder.glob(f"trials/*/{REQUEST}")):
        path.unlink(missing_ok=True)


def request_save(storage: ProjectFolder, sweep: str, reason: str) -> None:
    """Request that the running trials of a sweep save at their next step, and go on."""
    write_json(storage.sweep(sweep) / SAVE, {"asked": time.time(), "reason": reason})


def last_save_request(storage: ProjectFolder, sweep: str) -> int | None:
    """A number that is another one after each request to save; None where there was none. Costs one file system look-up."""
    try:
        return (storage.sweep(sweep) / SAVE).stat().st_mtime_ns
    except OSError:
        return None
