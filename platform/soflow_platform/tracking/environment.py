"""Tags that describe the machine and the code of an MLflow run."""

from __future__ import annotations

import platform
import socket
import subprocess
from pathlib import Path

CODE = Path(__file__).parents[1]
"""The folder of this package."""


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


def git_commit(folder: Path = CODE) -> str | None:
    """Commit of the repository that holds the code in `folder`, with `-dirty` appended where files of it differ from the commit.

    Without an argument that of the code that runs, whatever the working folder is. None where the code is in no repository, as where it
    was installed from a wheel, also beside one in a virtual environment.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=True
        )
        return done.stdout.strip()

    try:
        if not git("ls-files"):
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
