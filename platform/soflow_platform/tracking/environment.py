"""Tags that describe the machine and the code of an MLflow run."""

from __future__ import annotations

import platform
import socket
import subprocess


def host_tags() -> dict[str, str]:
    """Host name, GPU, library versions and git commit, as tags of a run."""
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
    commit = git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def git_commit() -> str | None:
    """Commit of the working folder, with `-dirty` appended where files differ from it; None outside a repository."""
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
