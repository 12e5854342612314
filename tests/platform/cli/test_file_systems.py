"""Places that are read-only, and places whose names have spaces and letters beyond ASCII."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import FlowMatching
from soflow_core.weights import save_weights
from soflow_pipelines.preparation.builtin import ensure_builtin
from soflow_platform.cli.main import main
from tests.support.commands import REDUCED, environment
from tests.support.commands import command as command_line
from tests.support.small_disks import mounted

Command = Callable[..., tuple[int, str]]
NAME = "Bilder für Ελένη 1 — 画像"
CONFIG = DiTConfig(channels=1, height=8, width=8, patch=4, hidden=16, depth=1, heads=2, classes=10)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process -> its exit code, and its message."""

    def run(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["soflowctl", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds a shard set and weights, and takes nothing more."""
    with mounted(tmp_path / "disk", 8) as disk:
        ensure_builtin("digits", disk / "set")
        save_weights(disk / "w.safetensors", DiT(CONFIG).state_dict(), CONFIG, FlowMatching(drop=0.0), {})
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield disk


@pytest.mark.parametrize(
    "words",
    [
        ["run", "digits", "--storage", "{}/project"],
        ["generate", "--model", "{}/w.safetensors", "--num", "2", "--out", "{}/images"],
        ["data", "inspect", "{}/set", "--sheet", "{}/sheet.png"],
        ["data", "prepare", "digits", "--out", "{}/out"],
    ],
    ids=lambda words: words[0] + words[1],
)
def test_what_cannot_be_written_is_named(read_only: Path, command: Command, words: list[str]) -> None:
    code, message = command(*(word.replace("{}", str(read_only)) for word in words))
    assert code in (1, 2)
    assert "cannot be written" in message
    assert "Read-only file system" in message
    assert "This is a bug" not in message


def test_what_is_on_a_read_only_disk_is_read(read_only: Path, tmp_path: Path, command: Command) -> None:
    assert command("data", "verify", read_only / "set")[0] == 0
    assert command("data", "inspect", read_only / "set")[0] == 0
    assert command("status", "--storage", read_only / "project")[0] == 0
    images = tmp_path / "images"
    words = ("generate", "--model", read_only / "w.safetensors", "--num", "2", "--out", images)
    assert command(*words)[0] == 0
    assert len(list(images.glob("0*.png"))) == 2


def test_names_with_spaces_and_letters_of_all_kinds_are_kept(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / NAME
    data = ensure_builtin("digits", folder / NAME)
    weights, images = folder / f"{NAME}.safetensors", folder / "images of it"
    save_weights(weights, DiT(CONFIG).state_dict(), CONFIG, FlowMatching(drop=0.0), {})
    assert command("data", "verify", data)[0] == 0
    assert command("data", "inspect", data, "--sheet", folder / f"{NAME}.png")[0] == 0
    assert command("generate", "--model", weights, "--num", "2", "--out", images)[0] == 0
    assert command("generate", "--verify", images)[0] == 0
    sweep = shutil.copy(Path(__file__).parents[3] / "sweeps" / "digits.yaml", folder / f"{NAME}.yaml")
    settings = ("--set", f"data.source={data}", "--set", "evaluation.features=pooled")
    assert command("run", sweep, "--dry-run", *settings, "--storage", folder)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {NAME}


@pytest.mark.slow
def test_a_sweep_runs_below_such_a_name(tmp_path: Path) -> None:
    folder = ["--storage", str(tmp_path / NAME)]
    for words in (["run", "digits", *REDUCED, *folder], ["runs", *folder]):
        done = subprocess.run(
            command_line(*words), env=environment(), capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {NAME}
