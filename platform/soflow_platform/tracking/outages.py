"""Failures of what a command stands on - disks, storages, servers - told from bugs."""

from __future__ import annotations

import errno
import sys

from soflow_core.failures import summarize
from soflow_pipelines.storage.object_store import StorageError

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
CLIENTS = ("mlflow", "requests", "boto3", "botocore")


def describe_outage(error: Exception) -> str | None:
    """Which storage, disk or server failed, in one sentence without its full stop; None where the error is something else."""
    if isinstance(error, StorageError):
        return summarize(error)
    if isinstance(error, OSError) and error.errno in DISK:
        return f"{error.filename or 'the disk'} cannot be written or read: {error.strerror}"
    if "mlflow" in sys.modules and type(error).__module__.split(".")[0] in CLIENTS:
        return f"the tracking server does not answer: {summarize(error)}" if is_outage(error) else None
    return None


AWAY = (
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
)
"""MLflow's names for the answers 500, 502, 503, 504 and 429, and for none."""


def is_outage(error: BaseException) -> bool:
    """Whether the tracking store, or where it keeps artifacts, was away, and not asked for something wrong."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in AWAY
    status = _http_status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return isinstance(error, OSError) or _boto_lost(error)


def is_away(error: BaseException) -> bool:
    """Whether a tracking store, a storage or a disk was away."""
    return isinstance(error, StorageError) or is_outage(error)


def _http_status(error: BaseException) -> int | None:
    """The status of the answer that requests or boto raised this for."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(answer, "status_code", None)


def _boto_lost(error: BaseException) -> bool:
    """Whether boto, which need not be installed, lost its connection; of a failed upload it says so in words alone."""
    kinds = [
        k for k in type(error).__mro__ if k.__module__.startswith(("boto3.", "botocore.", "s3transfer."))
    ]
    names = {kind.__name__ for kind in kinds}
    if names & {"ConnectionError", "HTTPClientError", "RetriesExceededError"}:
        return True
    handled = error.__context__
    return "S3UploadFailedError" in names and handled is not None and is_outage(handled)
