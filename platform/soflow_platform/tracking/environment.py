"""soflow_platform.tracking.environment"""

from __future__ import annotations

import platform
import socket
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def host_tags() -> dict[str, str]:
    """Where and with what code a run was made."""
    import ray
    import torch

    tags = {
        "host.name": socket.gethostname(),
        "host.python": platform.python_version(),
        "host.torch": torch.__version__,
        "host.ray": ray.__version__,
    }
    if torch.cuda.is_available():
        tags["host.gpu"] = torch.cuda.get_device_name()
    commit = _git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def _git_commit() -> str | None:
    """The commit of the working folder, with a mark where files differ from it; None outside a repository."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        changes = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")
