"""What is kept of an exception that ends a trial: a sentence that names the line of code at fault, and the whole traceback."""

from __future__ import annotations

import importlib.util
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path

from soflow_core.failures import InputError, printable, summarize
from soflow_platform.errors import JobError
from soflow_platform.storage.retry import is_storage_outage

PACKAGES = ("soflow_core", "soflow_pipelines", "soflow_platform")
CLIENTS = ("ray", "mlflow", "sqlalchemy", "sqlite3", "requests", "urllib3", "boto3", "botocore")
"""Packages whose errors are those of a service, which may be back when the trial is started again."""
MACHINES = (
    *("gloo", "nccl", "process group", "processgroup", "socket", "connect", "peer", "broken pipe"),
    *("timeout", "timed out", "cuda", "cudnn", "cublas", "hip error", "out of memory"),
)
"""Parts of a RuntimeError's text where a device failed, or the connection to another rank: torch has no class of its own for all."""

NO_MEMORY = ("OutOfMemoryError", "MemoryError", "out of memory")
"""Parts of an error's text where a device or a machine had no memory left for the trial."""


@dataclass(frozen=True)
class Failure:
    """Why a trial cannot go on."""

    sentence: str
    traceback: str
    own_fault: bool = False
    """Whether the trial itself is at fault, by its settings, its code or its size, so that another start meets the same."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Of an exception that was raised. One with a text for the user keeps it; others get their class and their place."""
        sentence = printable(error) if isinstance(error, (JobError, InputError)) else described(error)
        return cls(sentence, "".join(traceback.format_exception(error)), is_own_fault(error))

    @classmethod
    def of_text(cls, sentence: str, traceback: str) -> Failure:
        """Of an exception in another process, of which the text is known."""
        return cls(sentence, traceback, any(sign in f"{sentence}\n{traceback}" for sign in NO_MEMORY))


def described(error: BaseException) -> str:
    """`RuntimeError: The size of tensor a (16) must match ... (soflow_core/objectives/soflow.py:120, loss)`."""
    kind, text, place = type(error).__name__, printable(summarize(error)), place_of(error)
    named = kind if text == kind else f"{kind}: {text}"
    return f"{named} ({place})" if place else named


def place_of(error: BaseException) -> str | None:
    """File, line and function of the innermost frame in code of the project or of the user, not of a library; None without one."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        shown = _own_file(frame.filename)
        if shown is not None:
            return printable(f"{shown}:{frame.lineno}, {frame.name}")
    return None


def another_start_may_help(error: Exception) -> bool:
    """Whether a machine, a device or a service may be at fault. Any other exception comes again: a step is a function of the state."""
    if is_storage_outage(error) or isinstance(error, MemoryError):
        return True
    if isinstance(error, (JobError, InputError)):
        return False
    kinds = type(error).__mro__
    if any(kind.__module__.split(".")[0] in CLIENTS for kind in kinds):
        return True
    if any(kind.__name__ in ("AcceleratorError", "DistError", "OutOfMemoryError") for kind in kinds):
        return True
    return type(error) is RuntimeError and any(part in str(error).lower() for part in MACHINES)


def is_own_fault(error: BaseException) -> bool:
    """Whether a trial failed by itself: by numbers that are not finite, by too little memory, or by an exception in its code.

    Not by a machine, a storage or a service, and not by input that can be mended.
    """
    if isinstance(error, (JobError, InputError)):
        return bool(getattr(error, "own_fault", False))
    if any(sign in f"{type(error).__name__}: {error}" for sign in NO_MEMORY):
        return True
    return isinstance(error, Exception) and not another_start_may_help(error)


def _own_file(filename: str) -> str | None:
    """How a file of the project or of the user is named in a sentence; None for one of a library or of Python."""
    if filename.startswith("<"):
        return None
    path = Path(filename)
    for package in PACKAGES:
        root = _package_folder(package)
        if root is not None and path.is_relative_to(root):
            return str(path.relative_to(root.parent))
    standard = Path(sysconfig.get_paths()["stdlib"])
    library = {"site-packages", "dist-packages"} & set(path.parts) or path.is_relative_to(standard)
    return None if library else str(path)


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None
