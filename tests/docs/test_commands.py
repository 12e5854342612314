"""Every command line and Python block of the documents and of the heads of sweep files is accepted, and executed where a machine
like this one has what it needs.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.docs.workplace import make_workplace, reduced
from tests.support.commands import REDUCED, command, environment
from tests.support.documents import BLOCKS, COMMANDS, ROOT, Block, Command

NEEDS = {
    "installation",
    "a cluster",
    "a GPU",
    "a quiet machine",
    "a running sweep",
    "snapshots",
    "a better candidate",
    "a network of several scales",
    "a model hub and S3",
    "published weights",
    "a server",
}
"""What a block may be marked with as needing. The commands of such a block are parsed; those for a running sweep have a test."""


def of(pages: Sequence[str], *, slow: bool = False) -> list[Block]:
    """The commands and programs of these pages that any machine can run, in order."""
    return [
        block
        for block in BLOCKS
        if str(block.page.relative_to(ROOT)) in pages
        if block.language in ("sh", "python")
        if block.needs is None and (block.mark == "takes") == slow
    ]


# What every command is checked for


def test_blocks_are_marked_with_what_is_known() -> None:
    assert {block.needs for block in BLOCKS if block.mark == "needs"} <= NEEDS
    assert {block.mark for block in BLOCKS} <= {"", "needs", "takes", "file", "lines"}


def parsed(command: Any, name: str, arguments: list[str], parent: Any = None) -> None:
    """Has a click command parse its arguments, and the command that they name."""
    context = command.make_context(name, list(arguments), parent=parent)
    if hasattr(command, "resolve_command"):
        name, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        parsed(inner, name, rest, context)


def soflowctl_parses(arguments: list[str]) -> None:
    from soflow_platform.cli.main import app

    parsed(typer.main.get_command(app), "soflowctl", arguments)


def ray_parses(arguments: list[str]) -> None:
    from ray.scripts.scripts import cli

    parsed(cli, "ray", arguments)


def mlflow_parses(arguments: list[str]) -> None:
    from mlflow.cli import cli

    parsed(cli, "mlflow", arguments)


class Accepted(Exception):
    """The arguments of a program were parsed."""


def python_parses(arguments: list[str]) -> None:
    """A program of the repository parses its arguments; of `-m pip` and `-m pytest`, the files exist."""
    if arguments[0] == "-m":
        named = {
            word.split("::")[0]
            for word in arguments[2:]
            if "/" in word and "*" not in word and "://" not in word
        }
        shown = {block.value for block in BLOCKS if block.mark == "file"}
        assert [name for name in named - shown if not (ROOT / name).exists()] == []
        return
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        original(parser, *args, **kwargs)
        raise Accepted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(Accepted):
            runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def make_parses(arguments: list[str]) -> None:
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def gpu_suite_parses(arguments: list[str]) -> None:
    """The script passes its arguments on."""
    python_parses(["benchmarks/gpu_suite.py", *arguments])


def tool_exists(arguments: list[str]) -> None:
    assert arguments


PARSERS: dict[str, Callable[[list[str]], None]] = {
    "soflowctl": soflowctl_parses,
    "ray": ray_parses,
    "mlflow": mlflow_parses,
    "python": python_parses,
    "make": make_parses,
    "benchmarks/gpu.sh": gpu_suite_parses,
}
SHELL = {
    *("touch", "pip", "pre-commit", "git", "uv", "ruff", "mypy", "source", "cp", "mkdir"),
    *("docker", "kubectl", "sbatch"),
}
"""Programs whose arguments are not ours to check."""


@pytest.mark.parametrize("shown", COMMANDS, ids=lambda shown: shown.name)
def test_a_command_that_is_shown_parses(shown: Command) -> None:
    program, *arguments = shown.arguments
    program = program.removeprefix(".venv/bin/")
    assert program in PARSERS.keys() | SHELL | {"export"}, f"no test parses {program}"
    if program in PARSERS:
        PARSERS[program](arguments)


INLINE = re.compile(r"`(soflowctl [a-z][^`]*)`")


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS}), ids=lambda page: page.name)
def test_commands_in_sentences_name_commands_and_options_that_exist(page: Path) -> None:
    from soflow_platform.cli.main import app

    group: Any = typer.main.get_command(app)
    for line in INLINE.findall(page.read_text(encoding="utf-8")):
        words = line.split()[1:]
        found = group.commands.get(words[0])
        assert found is not None, line
        if hasattr(found, "commands"):
            found = found.commands[words[1]]
        options = {
            name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options, line


def test_the_usage_of_a_command_lists_its_options() -> None:
    """In `docs/data.md`, the page that shows commands with all of their options."""
    from soflow_platform.cli.main import app

    group: Any = typer.main.get_command(app)
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```text\n(soflowctl .*?)^```", text, re.DOTALL | re.MULTILINE)
    usages = [
        usage for block in blocks for usage in re.findall(r"^soflowctl .*(?:\n .*)*", block, re.MULTILINE)
    ]
    assert len(usages) == 3
    for usage in usages:
        command = group.commands["data"].commands[usage.split()[2]]
        options = {option for parameter in command.params for option in parameter.opts if option[:2] == "--"}
        assert set(re.findall(r"--[\w-]+", usage)) == options - {"--help"}, usage


def test_a_sweep_on_a_cluster_is_shown_with_a_tracking_server() -> None:
    """A cluster of several machines refuses the default, which is SQLite."""
    shown = [each for each in COMMANDS if each.arguments[:2] == ["soflowctl", "run"]]
    clusters = [each for each in shown if "--address" in each.arguments]
    assert len(clusters) > 5
    assert [each.name for each in clusters if "tracking.uri=" not in each.line] == []


# What is executed


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands for the reader's: sweeps/, small data, and the files that the pages show."""
    return make_workplace(tmp_path_factory.mktemp("reader"))


def execute(block: Block, workplace: Path) -> None:
    if block.language == "python":
        done = subprocess.run(
            [sys.executable, "-c", block.text],
            cwd=workplace,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    for shown in block.commands if block.language == "sh" else []:
        run_command(shown, workplace)


def run_command(shown: Command, workplace: Path) -> str:
    program, *arguments = reduced(shown.arguments)
    if program == "soflowctl" and arguments[0] == "ui":
        return serve(arguments, workplace)
    if arguments[:2] == ["data", "prepare"]:
        # A set that the tests have put there stands for this command's.
        shutil.rmtree(workplace / arguments[arguments.index("--out") + 1], ignore_errors=True)
    line = (
        command(*arguments)
        if program == "soflowctl"
        else [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
    )
    done = subprocess.run(
        line,
        cwd=workplace,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{shown.line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def serve(arguments: list[str], workplace: Path) -> str:
    """`soflowctl ui` until it has printed its address."""
    with subprocess.Popen(
        command(*arguments, "--no-open", "--port", "0"),
        cwd=workplace,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if "http://127.0.0.1:" in line:
                break
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert lines
    assert "http://127.0.0.1:" in lines[-1]
    return "".join(lines)


FIRST_HOUR = of(["README.md"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("block", FIRST_HOUR, ids=lambda block: block.name)
def test_the_first_hour_of_the_readme_runs(block: Block, workplace: Path) -> None:
    execute(block, workplace)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "block",
    of(
        [
            "docs/data.md",
            "docs/generation.md",
            "docs/scoring.md",
            "docs/evaluation.md",
            "docs/operations.md",
            "docs/sweeps.md",
            "docs/registry.md",
        ]
    ),
    ids=lambda block: block.name,
)
def test_the_other_pages_run(block: Block, workplace: Path) -> None:
    if not (workplace / "images").exists():
        for earlier in FIRST_HOUR:
            execute(earlier, workplace)
    execute(block, workplace)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "block",
    [
        *of(["README.md"], slow=True),
        *(block for block in BLOCKS if block.page.suffix == ".yaml" and block.needs is None),
    ],
    ids=lambda block: block.name,
)
def test_the_heads_of_sweep_files_run(block: Block, workplace: Path) -> None:
    execute(block, workplace)


@pytest.mark.parametrize(
    "shown",
    [c for c in COMMANDS if c.arguments[:2] == ["soflowctl", "run"] and c.block.page.suffix == ".yaml"],
    ids=lambda shown: shown.name,
)
def test_the_plan_of_every_sweep_file_is_printed(
    shown: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of those that need a cluster: a dry run connects to nothing, and is run in this process."""
    from soflow_platform.cli.main import main

    words = [w.replace("/shared/imagenet-latents", "imagenet-latents") for w in shown.arguments]
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", words if "--dry-run" in words else [*words, "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code in (0, None), printed.err
    assert "parameters" in printed.out


@pytest.fixture
def running_sweep(workplace: Path) -> Iterator[subprocess.Popen[str]]:
    """A digits sweep in a project folder of its own that would train for long."""
    shutil.rmtree(workplace / "running", ignore_errors=True)
    (workplace / "running").mkdir()
    line = ["run", "digits", *REDUCED]
    with subprocess.Popen(
        command(*line, "--set", "training.steps=100_000", "--set", "evaluation.every=50_000"),
        cwd=workplace / "running",
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        for _ in range(600):
            if list((workplace / "running").glob("soflow-runs/sweeps/*/trials/trial-03*/status.json")):
                break
            time.sleep(0.2)
        yield process
        if process.poll() is None:
            process.terminate()
        process.wait(120)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.needs == "a running sweep"], ids=lambda block: block.name
)
def test_what_is_shown_of_a_running_sweep_runs(
    block: Block, running_sweep: subprocess.Popen[str], workplace: Path
) -> None:
    followers = []
    for shown in block.commands:
        if "--follow" in shown.arguments:
            line = command(*shown.arguments[1:])
            followers.append(
                subprocess.Popen(
                    line, cwd=workplace / "running", env=environment(), stdout=subprocess.DEVNULL
                )
            )
        else:
            run_command(shown, workplace / "running")
    assert running_sweep.wait(60) == 143
    assert [follower.wait(60) for follower in followers] == [0] * len(followers)
