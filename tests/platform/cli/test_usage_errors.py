"""Wrong arguments and settings end with one sentence on stderr and exit code 2, and create nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from soflow_platform.cli.main import app, main
from soflow_platform.config.validation import read_experiment
from soflow_platform.storage.checkpoints import CheckpointState
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import new_or_resumed_record, sweep_id
from soflow_platform.tuning.search_space import trials
from tests.support.in_process import run_here

ROOT = Path(__file__).parents[3]
DIGITS = str(ROOT / "sweeps" / "digits.yaml")


def soflowctl(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SOFLOW_", "RAY_"))}
    return subprocess.run(
        [sys.executable, "-m", "soflow_platform.cli.main", *arguments],
        cwd=folder,
        env={**environment, "COLUMNS": "160", "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


MISTAKES = {
    "a misspelt key": (
        ["run", DIGITS, "--set", "training.bacth=4"],
        "--set training.bacth: unknown key `bacth` in `training`; did you mean `batch`?",
    ),
    "a wrong type": (
        ["run", DIGITS, "--set", "training.steps=many"],
        "--set training.steps: `training.steps` is 'many': input should be a valid integer",
    ),
    "a file that is not there": (
        ["run", "absent.yaml"],
        "there is no sweep file absent.yaml; give a path, or one of those that come with soflow: b2, b4, ",
    ),
    "an unknown method": (
        ["run", DIGITS, "--set", "objective.method=soflaw"],
        "unknown method 'soflaw' in `objective`; known are alphaflow",
    ),
    "a batch that does not divide": (
        ["run", DIGITS, "--set", "resources.workers=3"],
        "training.batch (128) does not divide over 3 worker(s) (resources.workers, resources.min_workers, "
        "training.accumulate): take a multiple, or workers of 1, 2, 4.",
    ),
    "a metric that is never reported": (
        ["run", DIGITS, "--set", "search.metric=eval/fid"],
        "search.metric 'eval/fid' is never reported: this sweep reports eval/fd_nfe1, eval/fd_nfe2",
    ),
    "a storage folder that cannot be written": (
        ["run", DIGITS, "--storage", "/proc/soflow"],
        "storage folder /proc/soflow cannot be written",
    ),
    "a storage URI of an unknown kind": (
        ["run", DIGITS, "--storage", "ftp://host/runs"],
        "storage 'ftp://host/runs' is not a folder",
    ),
    "an address that is none": (["run", DIGITS, "--address", "nowhere"], "is not of the form HOST:PORT"),
    "data that is not set": (
        ["run", "xl2"],
        "data.source is not set: make latents with `soflowctl data prepare IMAGENET_FOLDER --autoencoder",
    ),
    "pixels that are not set": (
        ["run", "methods-cifar10"],
        "data.source is not set: make a set of pixels with `soflowctl data prepare IMAGES --out FOLDER`",
    ),
    "data that is not there": (
        ["run", "xl2", "--set", "data.source=absent-latents"],
        "data.source 'absent-latents' is not a folder: make latents with `soflowctl data prepare",
    ),
    "a patch that does not divide the image": (
        ["run", DIGITS, "--set", "network.patch=3"],
        "network: an input of 8 x 8 is not divisible by a patch of 3",
    ),
    "an override without a value": (
        ["run", DIGITS, "--set", "training.steps"],
        "is not of the form section.key=value",
    ),
    "an unknown option": (["run", DIGITS, "--dryrun"], "No such option"),
    "a registry that is not there": (["promote", "digits"], "there is no model registry under"),
    "runs that are not there": (["ui"], "there are no runs under"),
    "a sweep that is not there": (["runs", "digits-123"], "there is no sweep 'digits-123'"),
    "a weights file that is not there": (
        ["generate", "--model", "some/weights.safetensors", "--out", "images"],
        "some/weights.safetensors: there is no such file or folder; name models:/NAME@ALIAS, a run",
    ),
    "images to generate with": (
        ["generate", "--model", str(ROOT), "--out", "images"],
        "holds no weights: name models:/NAME@ALIAS, a run, SWEEP/TRIAL, a checkpoint folder, or a .safetensors file.",
    ),
    "nothing to generate with": (
        ["generate", "--out", "images"],
        "--model and --out are needed, or --verify.",
    ),
    "latents in a format of images": (
        ["generate", "--model", "x", "--out", "images", "--latents", "--format", "npz"],
        "--latents writes raw latents, --format npz images: leave one of them out.",
    ),
    "one class and several": (
        ["generate", "--model", "x", "--out", "images", "--label", "1", "--labels", "uniform"],
        "--label is one class for all images, --labels several: leave one of them out.",
    ),
    "a set to verify that is not there": (
        ["generate", "--verify", "images"],
        "images holds no set that `soflowctl generate` made: it has no generation.json.",
    ),
    "a model to generate with that is not registered": (
        ["generate", "--model", "models:/digits@champion", "--out", "images"],
        "there is no model registry under",
    ),
    "a rollback that changes nothing": (
        ["promote", "digits", "--rollback", "--dry-run"],
        "--dry-run has no meaning with --rollback: leave one of them out.",
    ),
    "a forced promotion that is scored": (
        ["promote", "digits", "--force", "a reason", "--samples", "100"],
        "--samples has no meaning with --force: leave one of them out.",
    ),
    "a set that is verified and made": (
        ["generate", "--verify", "images", "--model", "digits"],
        "--model has no meaning with --verify: leave one of them out.",
    ),
    "rows that are left out of no table": (
        ["generate", "--model", "digits", "--out", "images", "--skip-bad"],
        "--skip-bad leaves out rows of --table: name the table, or leave it out.",
    ),
    "images where nothing can be written": (
        ["generate", "--model", "digits", "--out", "/proc/images"],
        "--out /proc/images cannot be written (",
    ),
    "averages where nothing can be written": (
        ["ema", "digits/trial-00", "--length", "0.1", "--out", "/proc/ema"],
        "--out /proc/ema cannot be written (",
    ),
    "an export where nothing can be written": (
        ["export", "digits", "--to", "safetensors", "--out", "/proc/digits.safetensors"],
        "--out /proc/digits.safetensors cannot be written: ",
    ),
    "a plot where nothing can be written": (
        ["evaluate", "digits", "--plot", "/proc/scores.png"],
        "--plot /proc/scores.png cannot be written (",
    ),
    "a port that is none": (
        ["ui", "--port", "70000"],
        "'--port': Input should be less than or equal to 65535",
    ),
    "a number of steps that is a sign": (
        ["evaluate", "digits", "--steps", "²"],
        "'²' is no number of steps; give numbers from 1 to 10,000, such as 1,2,4.",
    ),
    "more steps than a sampler takes": (
        ["generate", "--model", "digits", "--out", "images", "--steps", "1000000000"],
        "'--steps': Input should be less than or equal to 10000",
    ),
    "a seed of more than 64 bits": (
        ["generate", "--model", "digits", "--out", "images", "--seed", str(2**63)],
        f"--seed {2**63} is beyond 64 bits: give a smaller number.",
    ),
    "a label that is a sign": (
        ["generate", "--model", "digits", "--out", "images", "--labels", "0,²"],
        "--labels '0,²' names no labels: give balanced, uniform or numbers such as 0,1,2.",
    ),
    "a name longer than a file system takes": (
        ["evaluate", "x" * 300],
        f"{'x' * 80}... cannot be used: File name too long; name another place",
    ),
    "a setting longer than a file system takes": (
        ["validate", DIGITS, "--set", f"evaluation.autoencoder={'x' * 300}"],
        "cannot be used: File name too long; name another place",
    ),
    "a home of nobody": (
        ["status", "--storage", "~nobody-is-called-so/runs"],
        "a path begins with ~NAME, and this machine has no user of that name: write the path in full.",
    ),
    "images that are not there": (
        ["evaluate", "./images"],
        "./images: there is no such file or folder; name",
    ),
    "a number of steps that is none": (
        ["evaluate", "digits", "--steps", "1,two"],
        "--steps '1,two': 'two' is no number of steps; give numbers from 1 to 10,000, such as 1,2,4.",
    ),
    "times that are none": (
        ["evaluate", "digits", "--times", "0.5;0.2"],
        "--times '0.5;0.2' names no times; give numbers such as 0.6,0.3.",
    ),
    "times that do not make the steps": (
        ["generate", "--model", "digits", "--out", "images", "--times", "0.6,0.3", "--steps", "2"],
        "--times 0.6,0.3 makes 3 steps: leave --steps out.",
    ),
    "times and a grid": (
        ["evaluate", "digits", "--times", "0.5", "--grid", "power"],
        "--times and --grid both say where the steps end: leave one of them out.",
    ),
    "sampling of another method": (
        ["validate", DIGITS, "--set", "sampling.sampler=heun"],
        "`sampling`: soflow: sampler is 'heun'; it is one of 'consistency', 'ode'.",
    ),
    "times of a comparison that do not make its steps": (
        ["validate", DIGITS, "--set", "comparison=[{steps: [2, 4], sampling_times: [0.6]}]"],
        "sampling_times [0.6] make 2 steps: give steps: [2].",
    ),
    "times that do not fall": (
        ["validate", DIGITS, "--set", "objective.sampling_times=[0.3, 0.6]"],
        "sampling_times are 0.3, 0.6; give times between 1 and 0, each below the one before.",
    ),
    "a model to score that is not registered": (
        ["evaluate", "models:/digits@champion"],
        "there is no model registry under",
    ),
    "a sweep to compare that is not there": (
        ["compare", "methods-digits"],
        "there is no sweep 'methods-digits' under",
    ),
    "a page of a comparison that is no page": (
        ["compare", "methods-digits", "--markdown", "table.txt"],
        "--markdown table.txt: give a file FILE.md in a folder that exists.",
    ),
    "a plot of averages without scores": (
        ["ema", "digits/trial-00", "--length", "0.1", "--plot", "ema.png"],
        "--plot is of scores: give --score IMAGES too.",
    ),
    "a way of sampling that a method does not have": (
        ["validate", "methods-digits", "--set", "comparison=[{steps: [1], methods: [ict], sampler: ode}]"],
        "--set comparison: `comparison`: ict has no sampling setting `sampler`: it has sampling_grid, sampling_times.",
    ),
    "a number of evaluations that cannot be had": (
        [
            "validate",
            DIGITS,
            "--set",
            "objective={method: flow_matching, sampler: heun}",
            "--set",
            "search.space={}",
        ],
        "`evaluation.nfe`: 1 evaluations cannot be had, for flow_matching makes 2 in a step as it is sampled.",
    ),
    "features that are not known": (
        ["validate", DIGITS, "--set", "evaluation.features=inceptoin"],
        "`evaluation.features`: known are inception, dinov2, clip, digits-classifier, pooled and file:PATH.",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_sentence_and_creates_nothing(
    tmp_path: Path, mistake: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, through the console entry point: importing the networks anew for each would take minutes."""
    arguments, message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOFLOW_STORAGE", raising=False)
    monkeypatch.setattr(sys, "argv", ["soflowctl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capfd.readouterr().err
    assert ended.value.code == 2, printed
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_ends_the_process_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = soflowctl(tmp_path, "run", DIGITS, "--set", "training.bacth=4")
    assert done.returncode == 2
    assert done.stderr.startswith("soflowctl: error: --set training.bacth: unknown key `bacth`")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_address_where_no_ray_answers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOFLOW_STORAGE", raising=False)
    address = f"127.0.0.1:{free_port()}"
    done = run_here("run", DIGITS, "--address", address)
    assert done.returncode == 2
    assert f"no Ray answers at {address} (Connection refused)" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_another_server_at_the_address_is_refused(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        done = soflowctl(tmp_path, "run", DIGITS, "--address", address)
    assert done.returncode == 2, done.stderr
    assert f"no Ray answers at {address}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def commands(group: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, those of groups before their members: `(), run, data, data prepare`."""
    group = group or typer.main.get_command(app)
    yield words
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*words, name))


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    assert " ".join(["Usage: soflowctl", *words]) in result.output


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from soflow_platform.cli.main import app\n"
        f"for words in {list(commands())}:\n"
        "    app([*words, '--help'], standalone_mode=False)\n"
        "print('HEAVY', sorted({'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("HEAVY []\n")


def test_validate_prints_trials_steps_and_metric() -> None:
    done = run_here("validate", DIGITS)
    assert done.returncode == 0
    assert (
        "is valid: 4 trial(s) of soflow, 600 steps of 128 samples, compared by eval/fd_nfe1 (min)"
        in done.stdout
    )


def test_the_plan_of_xl2_names_parameters_resources_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOFLOW_STORAGE", raising=False)
    done = run_here("run", "xl2", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\ntrial-") == 13
    assert "676.4 M" in done.stdout
    assert "118.6 GMAC" in done.stdout
    assert "asks Ray for 8 worker(s) of 8 CPU and 1 GPU for each trial (64 CPU, 8 GPU)" in done.stdout
    assert "make latents with `soflowctl data prepare IMAGENET_FOLDER" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_version_is_that_of_the_distribution(tmp_path: Path) -> None:
    from importlib.metadata import version

    assert soflowctl(tmp_path, "version").stdout == f"soflow {version('soflow')}\n"


def test_a_sweep_with_checkpoints_in_another_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    storage = ProjectFolder(tmp_path)
    experiment, document = read_experiment(Path(DIGITS))
    sweep = sweep_id(storage, experiment, again=False)
    record = new_or_resumed_record(None, sweep, DIGITS, experiment, trials(document, experiment))
    record.save(storage)
    store = record.checkpoints(storage, record.trials[1].name)
    store.publish(CheckpointState(150, 19_200, "a-run"), lambda _: None)
    elsewhere = tmp_path / "elsewhere"
    arguments = ["run", DIGITS, "--storage", str(tmp_path), "--set", f"training.checkpoints={elsewhere}"]
    monkeypatch.setattr(sys, "argv", ["soflowctl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"are in {store.root} and not in {elsewhere}" in capfd.readouterr().err
    assert not elsewhere.exists()
