"""Failures of what a command stands on - disks, storages, servers - told from bugs."""

from __future__ import annotations

import errno
import sys

from soflow_pipelines.storage_error import StorageError
from soflow_platform.retries import first_line

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
CLIENTS = ("mlflow", "requests", "boto3", "botocore")


def what_is_away(error: Exception) -> str | None:
    """Which storage, disk or server failed, in one sentence without its full stop; None where the error is something else."""
    if isinstance(error, StorageError):
        return first_line(error)
    if isinstance(error, OSError) and error.errno in DISK:
        return f"{error.filename or 'the disk'} cannot be written or read: {error.strerror}"
    if "mlflow" in sys.modules and type(error).__module__.split(".")[0] in CLIENTS:
        from soflow_platform.tracking import is_outage

        return f"the tracking server does not answer: {first_line(error)}" if is_outage(error) else None
    return None
