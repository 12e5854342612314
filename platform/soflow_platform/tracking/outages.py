"""Classifies exceptions: an outage of a disk, an object store or a tracking server, or something else."""

from __future__ import annotations

import errno
import sqlite3
import sys

from soflow_core.failures import summarize
from soflow_pipelines.storage.object_store import StorageError

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
SQLITE = (
    "database or disk is full",
    "disk I/O error",
    "attempt to write a readonly database",
    "unable to open database file",
)
"""What SQLite says where the disk, and not the database, is at fault."""
CLIENTS = ("mlflow", "requests", "boto3", "botocore")


def describe_outage(error: Exception) -> str | None:
    """One sentence, without a full stop, on the storage, disk or server that failed; None where the error is no outage."""
    if isinstance(error, StorageError):
        return summarize(error)
    if isinstance(error, OSError) and error.errno in DISK:
        return f"{error.filename or 'the disk'} cannot be written or read: {error.strerror}"
    reason = sqlite_reason(error)
    if reason in SQLITE:
        return f"the tracking database cannot be written: {reason}"
    if "mlflow" in sys.modules and type(error).__module__.split(".")[0] in CLIENTS:
        return f"the tracking server does not answer: {summarize(error)}" if is_outage(error) else None
    return None


def sqlite_reason(error: BaseException) -> str | None:
    """What SQLite says, where the error is one of its own or SQLAlchemy's of it."""
    inner = getattr(error, "orig", error)
    return summarize(inner) if isinstance(inner, sqlite3.Error) else None


AWAY = (
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
)
"""MLflow's error codes for HTTP statuses 500, 502, 503, 504 and 429, and for a request without a response."""


def is_outage(error: BaseException) -> bool:
    """Whether the error is an outage of the tracking store or of its artifact storage, and not an invalid request."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in AWAY
    status = _http_status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return isinstance(error, OSError) or _boto_lost(error)


def is_away(error: BaseException) -> bool:
    """Whether the error is an outage of a tracking store, an object store or a disk."""
    return isinstance(error, StorageError) or is_outage(error)


def _http_status(error: BaseException) -> int | None:
    """HTTP status of the response for which requests or boto raised this error; None where there was no response."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(response, "status_code", None)


def _boto_lost(error: BaseException) -> bool:
    """Whether boto lost its connection. Classes are compared by name, because boto need not be installed.

    S3UploadFailedError does not say why an upload failed; the error that it was raised from does.
    """
    kinds = [
        k for k in type(error).__mro__ if k.__module__.startswith(("boto3.", "botocore.", "s3transfer."))
    ]
    names = {kind.__name__ for kind in kinds}
    if names & {"ConnectionError", "HTTPClientError", "RetriesExceededError"}:
        return True
    handled = error.__context__
    return "S3UploadFailedError" in names and handled is not None and is_outage(handled)
