"""Files of version 0.1.0 are read and resumed from; files of a newer version are read or refused, never misread.

`version_0_1/README.md` says what the files are and how they were made.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from soflow_core.weights import load_weights
from tests.support.commands import command, environment
from tests.support.in_process import run_here

OLDER = Path(__file__).parent / "version_0_1"
FINISHED, STOPPED = "finished-9ed4ff86", "stopped-e6678f8d"
BEST, OTHER = "trial-00-weight_power=0.5", "trial-01-weight_power=1"
STOPPED_AT, COMPARED_AT, LAST_STEP = 327, 350, 900
TEXT_FILES = {".json", ""}
"""Suffixes of the files that hold places; MLmodel has none."""
PIXEL_TOLERANCE = 1
"""Of 255: another processor may round a sample to the neighbouring value."""
WEIGHT_TOLERANCE = 1.5e-3
"""Other instructions of a processor change a weight by 4e-4 within the steps from STOPPED_AT to COMPARED_AT; a lost moment of the
optimizer or a batch that is left out by 4e-3."""

FORMAT = "format"
TOO_NEW = 1000


def soflowctl(*arguments: str | Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*map(str, arguments)),
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def succeeded(*arguments: str | Path, timeout: float = 280) -> str:
    """Standard output of a command that must succeed."""
    done = soflowctl(*arguments, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The older project folder at a temporary place, with its tracking database."""
    folder = tmp_path / "runs"
    shutil.copytree(OLDER / "project", folder)
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in TEXT_FILES:
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace("PROJECT_FOLDER", str(folder)), encoding="utf-8")
    dump = folder / "mlflow.sql.gz"
    with sqlite3.connect(folder / "mlflow.db") as database:
        database.executescript(
            gzip.decompress(dump.read_bytes()).decode().replace("PROJECT_FOLDER", str(folder))
        )
    database.close()
    dump.unlink()
    return folder


@pytest.fixture
def ask(project: Path) -> Callable[..., str]:
    """A command that reads the older project folder and succeeds."""

    def answer(*arguments: str) -> str:
        done = run_here(*arguments, "--storage", project)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return answer


def trial_folder(project: Path, sweep: str, trial: str) -> Path:
    return project / "sweeps" / sweep / "trials" / trial


def checkpoint_folder(project: Path, sweep: str, trial: str, step: int) -> Path:
    return trial_folder(project, sweep, trial) / "checkpoints" / f"step-{step:08d}"


def row(table: str, name: str) -> list[str]:
    """The cells of the table row that begins with `name`."""
    (line,) = [line for line in table.splitlines() if line.startswith(name)]
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def assert_same_images(made: Iterable[Path], expected: Iterable[Path]) -> None:
    pairs = list(zip(sorted(made), sorted(expected), strict=True))
    assert [one.name for one, _ in pairs] == [other.name for _, other in pairs]
    assert pairs
    for one, other in pairs:
        assert_same_pixels(Image.open(one), Image.open(other))


def assert_same_pixels(one: Image.Image, other: Image.Image) -> None:
    assert (one.size, one.mode) == (other.size, other.mode)
    difference = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
    assert difference.max() <= PIXEL_TOLERANCE


def change(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def query(project: Path, sql: str, *values: str) -> list[Any]:
    """The first column of what the tracking store answers."""
    database = sqlite3.connect(project / "mlflow.db")
    try:
        return [found[0] for found in database.execute(sql, values)]
    finally:
        database.close()


def test_older_sweeps_are_listed(ask: Callable[..., str]) -> None:
    table = ask("runs")
    assert row(table, FINISHED)[2:] == ["finished", "2", BEST, "eval/fd_nfe1 63.6", "finished v1"]
    assert row(table, STOPPED)[2:] == ["stopped", "1", "-", "-", "-"]


def test_trials_of_an_older_sweep_are_listed_with_their_scores(ask: Callable[..., str]) -> None:
    assert row(ask("runs", FINISHED), BEST) == [BEST, "60/60", "60", "63.6", "1"]
    assert row(ask("runs", "finished"), OTHER) == [OTHER, "60/60", "60", "63.62", "1"]
    assert row(ask("runs", STOPPED), "trial-00")[:3] == ["trial-00", f"{STOPPED_AT}/{LAST_STEP}", "300"]


def test_status_of_older_trials_is_shown(ask: Callable[..., str]) -> None:
    statuses = {sweep: json.loads(ask("status", sweep, "--json")) for sweep in (FINISHED, STOPPED)}
    keys = ("trial", "state", "step", "steps", "images", "checkpoint_step", "restarts", "silent")
    assert [tuple(trial[key] for key in keys) for trial in statuses[FINISHED]] == [
        (BEST, "finished", 60, 60, 960, 60, 0, False),
        (OTHER, "finished", 60, 60, 960, 60, 0, False),
    ]
    assert [tuple(trial[key] for key in keys) for trial in statuses[STOPPED]] == [
        ("trial-00", "stopped", STOPPED_AT, LAST_STEP, 16 * STOPPED_AT, STOPPED_AT, 0, False)
    ]
    assert statuses[STOPPED][0]["host"] == "older-host"
    assert statuses[STOPPED][0]["loss"] == pytest.approx(0.7398, abs=1e-4)
    assert ask("status").startswith(f"sweep {STOPPED}: stopped")


def test_log_of_an_older_trial_is_printed(ask: Callable[..., str]) -> None:
    written = (trial_folder(OLDER / "project", STOPPED, "trial-00") / "log.txt").read_text(encoding="utf-8")
    assert ask("logs", STOPPED) == written


def test_finished_older_sweep_is_not_trained_again(project: Path) -> None:
    before = (project / "sweeps" / FINISHED / "sweep.json").read_bytes()
    done = run_here("run", OLDER / "finished.yaml", "--storage", project)
    assert done.returncode == 0, done.stderr
    assert f"sweep {FINISHED} is finished" in done.stdout
    assert BEST in done.stdout
    assert sorted(path.name for path in (project / "sweeps").iterdir()) == [FINISHED, STOPPED]
    assert (project / "sweeps" / FINISHED / "sweep.json").read_bytes() == before


def test_weights_of_an_older_checkpoint_are_read(project: Path) -> None:
    weights = load_weights(checkpoint_folder(project, FINISHED, OTHER, 60) / "ema.safetensors")
    config, objective = weights.network_config, weights.objective
    assert (config.hidden, config.depth, config.heads, config.patch, config.classes) == (4, 1, 2, 4, 10)
    assert objective is not None
    assert (objective.method, weights.data["recipe"]) == ("soflow", {"source": "digits"})
    assert sum(tensor.numel() for tensor in weights.tensors.values()) == 2692


def test_older_checkpoint_makes_the_images_it_made(project: Path, tmp_path: Path) -> None:
    model, out = checkpoint_folder(project, FINISHED, OTHER, 60), tmp_path / "images"
    done = run_here("generate", "--model", model, "--num", "10", "--steps", "2", "--seed", "5", "--out", out)
    assert done.returncode == 0, done.stderr
    assert_same_images(out.glob("0*.png"), (OLDER / "expected" / "checkpoint").glob("*.png"))


def test_older_registered_model_makes_the_images_it_made(project: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    model = ("--model", "models:/finished@champion", "--storage", project)
    done = run_here("generate", *model, "--num", "10", "--out", images)
    assert done.returncode == 0, done.stderr
    assert_same_images(images.glob("0*.png"), (OLDER / "expected" / "model").glob("*.png"))


def test_older_registered_model_is_loaded_by_mlflow_with_its_own_code(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a model has a copy of the Python file that it was registered with."""
    import io

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    import pandas

    (description,) = (project / "artifacts" / "models").glob("*/artifacts/MLmodel")
    model = mlflow.pyfunc.load_model(str(description.parent))
    labels = pandas.DataFrame({"label": list(range(10))})
    images = model.predict(labels, params={"seed": 0, "steps": 1})["png"]
    expected = sorted((OLDER / "expected" / "model").glob("*.png"))
    for image, path in zip(images, expected, strict=True):
        assert_same_pixels(Image.open(io.BytesIO(image)), Image.open(path))


def test_champion_of_an_older_version_is_champion(project: Path) -> None:
    again = run_here("promote", "finished", "--storage", project)
    assert (again.returncode, "version 1 of 'finished' is the champion already" in again.stderr) == (2, True)


@pytest.mark.slow
def test_older_score_is_computed_again_by_this_code(ask: Callable[..., str]) -> None:
    (kept,) = (OLDER / "project" / "evaluations" / "results").glob("*.json")
    model = "models:/finished@champion"
    (score,) = json.loads(ask("evaluate", model, "--num", "128", "--features", "pooled", "--json"))
    assert score["fd"] == pytest.approx(
        json.loads(kept.read_text(encoding="utf-8"))["values"]["fd"], rel=1e-6
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stopped_older_sweep_goes_on_from_its_checkpoint(project: Path, ask: Callable[..., str]) -> None:
    folder = trial_folder(project, STOPPED, "trial-00")
    before = (folder / "log.txt").read_text(encoding="utf-8")
    older = json.loads(
        (checkpoint_folder(project, STOPPED, "trial-00", STOPPED_AT) / "checkpoint.json").read_text()
    )
    runs = query(project, "select run_uuid from runs order by run_uuid")

    # Which checkpoints are made and kept is no part of the sweep's id: it is the same sweep.
    checkpoints = ("--set", "training.checkpoint_every=50", "--set", "training.keep_checkpoints=50")
    succeeded("run", OLDER / "stopped.yaml", *checkpoints, "--storage", project, timeout=580)

    log = (folder / "log.txt").read_text(encoding="utf-8")
    assert log.startswith(before)
    assert f"step {STOPPED_AT}  going on" in log
    assert "step 0  " not in log.removeprefix(before)
    (status,) = json.loads(ask("status", STOPPED, "--json"))
    assert (status["state"], status["step"], status["restarts"]) == ("finished", LAST_STEP, 1)
    # The data set was written anew, and a checkpoint of other data would have been refused.
    last = checkpoint_folder(project, STOPPED, "trial-00", LAST_STEP)
    record = json.loads((last / "checkpoint.json").read_text(encoding="utf-8"))
    assert (record["run"], record["data"]) == (older["run"], older["data"])
    assert [evaluation["step"] for evaluation in record["evaluations"]] == [300, 600, LAST_STEP]
    assert record["evaluations"][:1] == older["evaluations"]
    # Optimizer, averages, order of the data and noise were restored: the weights are those of the run that was not stopped.
    made = load_file(checkpoint_folder(project, STOPPED, "trial-00", COMPARED_AT) / "ema.safetensors")
    expected = load_file(OLDER / "expected" / f"uncut-step-{COMPARED_AT}.safetensors")
    torch.testing.assert_close(made, expected, rtol=0, atol=WEIGHT_TOLERANCE)
    # The same runs have whole curves, each point once.
    assert query(project, "select run_uuid from runs order by run_uuid") == runs
    points = query(
        project,
        "select step from metrics where key = 'train/loss' and run_uuid = ? order by step",
        older["run"],
    )
    assert points == [1, *range(100, LAST_STEP + 1, 100)]
    assert row(ask("runs"), STOPPED)[-1] == "stopped v1"


def test_unknown_fields_of_a_newer_version_are_ignored(project: Path, ask: Callable[..., str]) -> None:
    path = project / "sweeps" / STOPPED / "sweep.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    experiment = {**record["experiment"], "newer_section": {"newer": 1}}
    trials = [{**trial, "newer": [1, 2]} for trial in record["trials"]]
    change(path, newer={"is": "not known here"}, experiment=experiment, trials=trials)
    change(trial_folder(project, STOPPED, "trial-00") / "status.json", newer="word")
    checkpoint = checkpoint_folder(project, STOPPED, "trial-00", STOPPED_AT)
    change(checkpoint / "checkpoint.json", newer=3)

    assert row(ask("runs"), STOPPED)[2:] == ["stopped", "1", "-", "-", "-"]
    assert row(ask("runs", STOPPED), "trial-00")[1] == f"{STOPPED_AT}/{LAST_STEP}"
    (status,) = json.loads(ask("status", STOPPED, "--json"))
    assert (status["state"], status["step"], status["checkpoint_step"]) == ("stopped", STOPPED_AT, STOPPED_AT)


def assert_refused(done: subprocess.CompletedProcess[str], file: Path) -> None:
    """One sentence, which names the file."""
    assert done.returncode == 2, done.stderr
    (sentence,) = done.stderr.strip().splitlines()
    assert str(file) in sentence
    assert str(TOO_NEW) in sentence


def test_weights_of_a_newer_format_are_refused(project: Path, tmp_path: Path) -> None:
    path = checkpoint_folder(project, FINISHED, OTHER, 60) / "ema.safetensors"
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["soflow"])
    save_file(load_file(path), path, metadata={"soflow": json.dumps({**header, FORMAT: TOO_NEW})})
    done = run_here("generate", "--model", path, "--num", "1", "--out", tmp_path / "images")
    assert_refused(done, path)


def test_sweep_record_of_a_newer_format_is_refused(project: Path) -> None:
    path = project / "sweeps" / STOPPED / "sweep.json"
    change(path, **{FORMAT: TOO_NEW})
    assert_refused(soflowctl("runs", STOPPED, "--storage", project), path)


def test_checkpoint_record_of_a_newer_format_is_refused(project: Path) -> None:
    path = checkpoint_folder(project, STOPPED, "trial-00", STOPPED_AT) / "checkpoint.json"
    change(path, **{FORMAT: TOO_NEW})
    assert_refused(soflowctl("runs", STOPPED, "--storage", project), path)
