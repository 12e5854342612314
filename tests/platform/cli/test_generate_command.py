"""`soflowctl generate` prints what it made, its progress where there is no terminal, and what `--verify` finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from soflow_platform.cli import terminal
from soflow_platform.cli.generate import choose_format, choose_labels
from soflow_platform.cli.main import app
from soflow_platform.cluster.actor_pool import Progress
from soflow_platform.errors import JobError
from tests.support.generators import save_digits_generator


def soflowctl(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_a_set_is_made_as_json_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFLOW_STORAGE", str(tmp_path / "runs"))
    model, out = str(save_digits_generator(tmp_path / "ema.safetensors")), tmp_path / "out"
    words = ("generate", "--model", model, "--out", str(out), "--num", "6", "--labels", "4,2", "--format")
    done = json.loads(soflowctl(*words, "parquet", "--json"))
    assert (done["made"], done["kept"], done["parts"], done["grid"]) == (6, 0, 1, None)
    assert done["images_per_second"] == pytest.approx(6 / done["seconds"])
    assert "0 images made, 6 were there" in soflowctl(*words, "parquet")
    assert "6 images are as they were written, each index once" in soflowctl("generate", "--verify", str(out))
    (out / "part-000000.parquet").unlink()
    with pytest.raises(
        JobError, match=r"1 damages; the same `soflowctl generate` makes files that are missing"
    ):
        soflowctl("generate", "--verify", str(out))
    assert "6 images made, 0 were there" in soflowctl(*words, "parquet")


def test_the_simple_command_makes_png_files_and_a_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFLOW_STORAGE", str(tmp_path / "runs"))
    model = str(save_digits_generator(tmp_path / "ema.safetensors"))
    printed = soflowctl("generate", "--model", model, "--out", str(tmp_path / "out"))
    assert f"100 images made, 0 were there: {tmp_path / 'out'}" in printed
    assert f"grid: {tmp_path / 'out'}/grid.png" in printed
    assert "sampled in 1 step (as recorded with its training; --steps, " in printed
    again = soflowctl(
        "generate", "--model", model, "--out", str(tmp_path / "two"), "--num", "2", "--steps", "2"
    )
    assert "sampled in 2 steps\n" in again
    assert len(list((tmp_path / "out").glob("0*-label-*.png"))) == 100


def test_formats_and_labels_of_options() -> None:
    assert [choose_format(*each) for each in ((None, False), (None, True), ("npz", False))] == [
        "png",
        "latents",
        "npz",
    ]
    assert [choose_labels(*each) for each in ((None, None), (None, 0), ("uniform", None))] == [
        None,
        "0",
        "uniform",
    ]


def test_progress_without_a_terminal_is_a_line_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    with terminal.image_progress("images") as report:
        report(Progress(10, 100))
        report(Progress(60, 100))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("images: ")]
    assert len(lines) == 1
    assert lines[0].startswith("images: 60 of 100, ")
    assert lines[0].endswith(" s left")
