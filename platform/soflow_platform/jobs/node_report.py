"""What `soflowctl doctor` asks of one machine: versions, devices, clock, limits, disks, and what it sees of storage and services.

`report_node` runs in the command's process and, as a Ray task, on every node of a cluster. What fails is in the report.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from soflow_core.failures import InputError, summarize
from soflow_pipelines.storage.files import write_bytes
from soflow_platform.storage.code_digest import running_code

NodeCheck = Callable[["NodeQuestions", str], "str | None"]
DRIVER_FILE, CONTESTED_FILE = "command", "contested"
CONTESTED_BYTES = 1 << 16
REPLACEMENTS = 20
"""How often each machine replaces the file that all of them write."""
SHARED_MEMORY = Path("/dev/shm")
DRIVER_DEVICE = Path("/proc/driver/nvidia/version")
"""There where a machine has NVIDIA's kernel driver."""


@dataclass(frozen=True)
class NodeQuestions:
    """What every machine is asked for."""

    folder: str
    """Folder of this check inside the project folder, which the command has created."""
    token: str
    """Content of the command's file in it."""
    tracking: str | None = None
    """Tracking server that every machine logs to; None where only this machine does."""
    checkpoints: str | None = None
    """`training.checkpoints`, where it is not a folder."""
    data: str | None = None
    """Folder or URI of the training data; None where they are not made yet."""
    features: str | None = None
    """Feature network that needs a weight file."""
    shape: tuple[int, ...] | None = None
    """(C, H, W) of the training data."""
    autoencoder: str | None = None
    """Whose weights are needed."""
    cache: str = ""
    """Folder of feature networks' weights."""


@dataclass(frozen=True)
class Disk:
    """Bytes of a file system."""

    path: str
    free: int
    total: int


@dataclass(frozen=True)
class NodeReport:
    """What a machine says of itself."""

    host: str
    versions: dict[str, str]
    """Of Python, the libraries that matter, and the digest of soflow's code; a library that is missing has none."""
    torch_wanted: str | None
    """Version of torch that the installed torchvision was built for."""
    torchvision_error: str | None
    devices: tuple[str, ...]
    """Names of the GPUs that torch sees."""
    cuda: str | None
    """CUDA version that torch was built with; None for a build without."""
    driver: bool
    """Whether NVIDIA's kernel driver is there."""
    shared_memory: Disk | None
    open_files: int
    """Files that a process may open at most, as it may set itself."""
    disks: tuple[Disk, ...]
    errors: dict[str, str] = field(default_factory=dict)
    """What of `storage`, `tracking`, `checkpoints`, `data`, `features` and `autoencoder` cannot be used from here, and why."""


def report_node(questions: NodeQuestions, name: str) -> NodeReport:
    """The report of this machine, which is called `name` in the folder that all machines share."""
    wanted, error = _torchvision()
    devices, cuda = _devices()
    errors = {
        what: failure
        for what, check in _CHECKS.items()
        if (failure := _failure(check, questions, name)) is not None
    }
    return NodeReport(
        host=socket.gethostname(),
        versions=_versions(),
        torch_wanted=wanted,
        torchvision_error=error,
        devices=devices,
        cuda=cuda,
        driver=DRIVER_DEVICE.exists(),
        shared_memory=_disk(SHARED_MEMORY),
        open_files=_open_files(),
        disks=tuple(
            disk
            for path in (Path(questions.folder).parent, Path(tempfile.gettempdir()))
            if (disk := _disk(path))
        ),
        errors=errors,
    )


def _versions() -> dict[str, str]:
    found = {package: _version(package) for package in ("torch", "torchvision", "ray", "mlflow")}
    installed = {package: version for package, version in found.items() if version is not None}
    return {"python": platform.python_version(), "code": running_code().digest, **installed}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torchvision() -> tuple[str | None, str | None]:
    """(the torch that the installed torchvision was built for, why it cannot be imported)."""
    try:
        needs = metadata.requires("torchvision") or []
    except metadata.PackageNotFoundError:
        return None, "it is not installed"
    wanted = next(
        (text.split(";")[0].split("==")[1].strip() for text in needs if text.startswith("torch==")), None
    )
    try:
        from torchvision.ops import nms
    except Exception as error:
        return wanted, summarize(error)
    return wanted, None if callable(nms) else "its operators are missing"


def _devices() -> tuple[tuple[str, ...], str | None]:
    """(names of the GPUs that torch sees, the CUDA that it was built with)."""
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return tuple(torch.cuda.get_device_name(i) for i in range(count)), torch.version.cuda
    except Exception:
        # A torch that cannot be imported has no version among those of the report's libraries, or fails with torchvision.
        return (), None


def _open_files() -> int:
    """The hard limit, because Ray raises the soft one to it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return hard if hard != resource.RLIM_INFINITY else 1 << 30


def _disk(path: Path) -> Disk | None:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return Disk(str(path), usage.free, usage.total)


def _failure(check: NodeCheck, questions: NodeQuestions, name: str) -> str | None:
    try:
        return check(questions, name)
    except InputError as error:
        return str(error)
    except Exception as error:
        return summarize(error)


def shared_folder_error(questions: NodeQuestions, name: str) -> str | None:
    """Why this machine cannot share the project folder with the others: it sees another one, cannot write, or sees parts of files."""
    folder = Path(questions.folder)
    try:
        seen = (folder / DRIVER_FILE).read_text()
    except FileNotFoundError:
        seen = ""
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if seen != questions.token:
        return "it is another folder there: mount the file system that all machines share at this path"
    mark = bytes([ord("a") + sum(name.encode()) % 26])
    try:
        for _ in range(REPLACEMENTS):
            write_bytes(folder / CONTESTED_FILE, mark * CONTESTED_BYTES)
            content = (folder / CONTESTED_FILE).read_bytes()
            if len(content) != CONTESTED_BYTES or content.count(content[:1]) != CONTESTED_BYTES:
                return "a file that another machine replaces is seen in parts: use a file system with atomic renames, such as NFS"
        write_bytes(folder / f"node-{name}", mark, durable=True)
    except OSError as error:
        user = os.geteuid()
        return f"it cannot be written ({error.strerror}): give the user with number {user} the right to write there"
    return None


def _tracking_error(questions: NodeQuestions, name: str) -> str | None:
    del name
    if questions.tracking is None:
        return None
    from soflow_platform.tracking.store import TrackingStore

    TrackingStore(questions.tracking).prepare()
    return None


def _checkpoints_error(questions: NodeQuestions, name: str) -> str | None:
    if questions.checkpoints is None:
        return None
    from soflow_pipelines.storage.opening import open_storage

    store, file = open_storage(questions.checkpoints), f".doctor-{questions.token}-{name}"
    store.write(file, questions.token.encode())
    try:
        return (
            None
            if store.read(file) == questions.token.encode()
            else "what was written there is not read back"
        )
    finally:
        store.remove(file)


def _data_error(questions: NodeQuestions, name: str) -> str | None:
    del name
    if questions.data is None:
        return None
    from soflow_pipelines.shards.tables import read_info

    read_info(questions.data)
    return None


def _features_error(questions: NodeQuestions, name: str) -> str | None:
    del name
    if questions.features is None:
        return None
    from soflow_pipelines.features.registry import open_features

    open_features(questions.features, Path(questions.cache), download=False, shape=questions.shape)
    return None


def _autoencoder_error(questions: NodeQuestions, name: str) -> str | None:
    del name
    if questions.autoencoder is None:
        return None
    from soflow_pipelines.images.autoencoder import load_autoencoder

    load_autoencoder(questions.autoencoder, download=False)
    return None


_CHECKS = {
    "storage": shared_folder_error,
    "tracking": _tracking_error,
    "checkpoints": _checkpoints_error,
    "data": _data_error,
    "features": _features_error,
    "autoencoder": _autoencoder_error,
}
