"""Tags that describe the machine and the code of an MLflow run."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from pathlib import Path

from soflow_platform.storage.code_digest import CODE_TAG, running_code

CODE = Path(__file__).parents[1]
"""The folder of this package."""
DIFF_LIMIT = 1_000_000
DIFF_ARTIFACT = "code/attempt-{}.diff"
"""Artifact of a sweep's run: what git says of the code that began an attempt, beside its commit."""


def host_tags() -> dict[str, str]:
    """Host name, GPU, library versions, digest of the code and git commit, as tags of a run."""
    import ray
    import torch

    tags = {
        "host.name": socket.gethostname(),
        "host.python": platform.python_version(),
        "host.torch": torch.__version__,
        "host.ray": ray.__version__,
        CODE_TAG: running_code().digest,
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

    try:
        if not _git(folder, "ls-files"):
            return None
        return _git(folder, "rev-parse", "HEAD") + ("-dirty" if _git(folder, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def git_diff(folder: Path = CODE) -> str:
    """How the Python files of the repository that holds `folder` differ from its commit; at most DIFF_LIMIT characters.

    Empty where they do not, and where the code is in no repository. New files are in it once git knows of them (`git add`).
    """
    try:
        if not _git(folder, "ls-files"):
            return ""
        changes = _git(folder, "diff", "HEAD", "--no-color", "--no-ext-diff", "--", ":/*.py")
    except (OSError, subprocess.SubprocessError):
        return ""
    return changes if len(changes) <= DIFF_LIMIT else f"{changes[:DIFF_LIMIT]}\n(cut here)"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        # A copy: the process's own may be changed by another thread's imports while the program is started.
        env=dict(os.environ),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=5,
        check=True,
    )
    return done.stdout.strip()
