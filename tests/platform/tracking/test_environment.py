"""The git commit that is kept with a run is that of the code that runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from soflow_platform.tracking.environment import git_commit, git_diff

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="this machine has no git")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one file of code, committed, and an environment that it ignores."""
    folder = tmp_path / "repository"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "code.py").write_text("value = 1\n")
    (folder / ".gitignore").write_text(".venv\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "code")
    return folder


def test_the_commit_is_that_of_the_code_in_whatever_folder(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commit = git(repository, "rev-parse", "HEAD")
    assert git_commit(repository / "package") == commit
    (repository / "package" / "code.py").write_text("value = 2\n")
    assert git_commit(repository / "package") == f"{commit}-dirty"


def test_the_difference_to_the_commit_is_kept_of_python_files_alone(repository: Path) -> None:
    (repository / "settings.txt").write_text("password = 1\n")
    git(repository, "add", "settings.txt")
    assert git_diff(repository / "package") == ""
    (repository / "package" / "code.py").write_text("value = -1\n")
    changes = git_diff(repository / "package")
    assert "-value = 1\n+value = -1" in changes
    assert "password" not in changes


def test_an_environment_in_a_repository_is_not_the_repositorys_code(repository: Path) -> None:
    installed = repository / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("value = 1\n")
    assert git_commit(installed) is None


def test_code_outside_of_a_repository_has_no_commit(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    assert git_diff(tmp_path) == ""
