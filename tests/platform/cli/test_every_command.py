"""Every command with odd arguments and options: a sentence and exit code 1 or 2, or success; never a traceback, and soon.

Commands and options are taken from the application itself, so that a new one is tried without being listed here. What needs a Ray
is given an address where none answers.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import shutil
import tempfile
import typing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import strategies as st

import soflow_platform
from soflow_core.networks import DiT, DiTConfig
from soflow_pipelines.preparation.builtin import ensure_builtin
from soflow_platform.cli.main import app
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import SweepRecord, TrialEntry
from tests.support.checked_command import CheckedCommand
from tests.support.fuzz import examples
from tests.support.generators import save_digits_generator

FEW, MANY = 2, 200
"""Examples of each command."""
AMOUNTS = [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
NUMBERS = ("-1", "0", "1", "3", "-0", "1_0", "2.5", "1e9", "nan", "-inf", "", "x", "0x10", "１", "9" * 30)
NEVER = "--address=127.0.0.1:1"
"""Port 1 of this machine, where nothing listens."""
SWEEP = (
    "network: {patch: 4, hidden: 16, depth: 1, heads: 2}\nextends: digits\nname: tiny\nsearch: {space: {}}\n"
)
CONFIG = DiTConfig(channels=1, height=8, width=8, patch=4, hidden=16, depth=1, heads=2, classes=10)


@dataclass(frozen=True)
class Tried:
    """A command and its parameters, as the application has them."""

    words: tuple[str, ...]
    parameters: tuple[Any, ...]
    kinds: dict[str, set[Any]]
    """Name of a parameter -> the types of its annotation."""

    @property
    def name(self) -> str:
        return " ".join(self.words)


def commands(group: Any, words: tuple[str, ...] = ()) -> list[Tried]:
    """Every command of the application, below its groups too."""
    found: list[Tried] = []
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found += commands(command, (*words, name))
        else:
            hints = typing.get_type_hints(inspect.unwrap(command.callback))
            kinds = {key: {hint, *typing.get_args(hint)} for key, hint in hints.items()}
            found.append(Tried((*words, name), tuple(command.params), kinds))
    return found


COMMANDS = commands(typer.main.get_command(app))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> dict[str, str]:
    """Sound and damaged things that a word on the command line may name."""
    # What a command imports is no part of what an odd word costs.
    for module in pkgutil.walk_packages(soflow_platform.__path__, "soflow_platform."):
        if "pyfunc_model" not in module.name:
            importlib.import_module(module.name)
    root = tmp_path_factory.mktemp("places")
    project = ProjectFolder(root / "project")
    project.root.mkdir()
    shutil.copy(empty_store, project.root)
    experiment = {"name": "tiny", "data": {"source": "digits"}, "training": {"steps": 4}}
    SweepRecord(
        id="tiny-00000000",
        name="tiny",
        file="tiny.yaml",
        experiment=experiment,
        trials=[TrialEntry("trial-00", {}, 4)],
        metric="eval/fd_nfe1",
        mode="min",
    ).save(project)
    shards = ensure_builtin("digits", root / "digits")
    weights = save_digits_generator(root / "ema.safetensors")
    (root / "cut.safetensors").write_bytes(weights.read_bytes()[:5000])
    (root / "tiny.yaml").write_text(SWEEP)
    (root / "empty").mkdir()
    (root / "junk.bin").write_bytes(bytes(range(256)) * 8)
    state = DiT(CONFIG).state_dict()
    torch.save({"ema_model": state, "model": state}, root / "official.pt")
    named = {path.name: str(path) for path in root.iterdir()}
    return {
        **named,
        "shards": str(shards),
        "null": os.devnull,
        "zero": "/dev/zero",
        "absent": str(root / "absent"),
    }


TEXT = st.text(alphabet="ab01.:@?#[]{}%&=,*-\\ '\"\x1b\u202eé\n", max_size=12)
NAMES = (
    "tiny",
    "tiny-00000000",
    "tiny-00000000/trial-00",
    "trial-00",
    "models:/tiny@champion",
    "models:/",
    "digits",
    "0" * 32,
)
URIS = (
    "http://[::1",
    "https://u:pw@h/x",
    "s3://",
    "sqlite:///",
    "file:",
    "postgresql://u:pw@h/d",
    "ftp://x",
    "models:/a/b/c",
)
NEED_MORE = ("ui", "generate", "models")
"""Commands without an argument that they require, and nothing to do in an empty folder."""
WRITTEN = ("out", "sheet", "name")
"""Parameters that say where something is written, or under which name."""
LOCAL = ("autoencoder", "features", "reference", "data", "tracking")
"""Parameters whose words, where they name nothing here, are looked for on the network."""


def value(parameter: Any, tried: Tried, places: dict[str, str]) -> st.SearchStrategy[str]:
    """Words for a parameter: odd numbers, its choices, names, places, texts."""
    # A project with runs would start a server.
    here = st.sampled_from(
        [place for name, place in places.items() if (tried.name, name) != ("ui", "project")]
    )
    kinds = tried.kinds[parameter.name]
    choices = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    if parameter.name in WRITTEN:
        return st.sampled_from(["out", "out.bin", "", ".", "a/b", "x" * 300, "\x1b[2J", "models:/x"])
    if choices:
        return st.sampled_from([*(str(each.value) for each in choices[0]), "", "x"])
    if kinds & {int, float}:
        return st.sampled_from(NUMBERS)
    if parameter.name == "storage":
        return here
    if parameter.name in LOCAL:
        return here | st.sampled_from(URIS)
    return st.one_of(here, here, TEXT, *(st.sampled_from(words) for words in (NAMES, URIS, NUMBERS)))


@st.composite
def command_lines(draw: st.DrawFn, tried: Tried, places: dict[str, str]) -> list[str]:
    """A command with some of its options and its arguments."""
    line, arguments = list(tried.words), []
    for parameter in tried.parameters:
        option = max(parameter.opts, key=len)
        if parameter.name == "address":
            # Images of a small network are made in this process.
            line.append("--workers=1" if tried.name == "generate" else NEVER)
        elif parameter.param_type_name == "argument":
            if draw(st.integers(0, 9)):
                arguments.append(draw(value(parameter, tried, places)))
        elif draw(st.integers(0, 9)) < (9 if parameter.required else 2) and parameter.name not in (
            "workers",
            "local",
        ):
            flag = getattr(parameter, "is_flag", False)
            line.append(option if flag else f"{option}={draw(value(parameter, tried, places))}")
    return [*line, "--", *arguments]


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("tried", COMMANDS, ids=lambda tried: tried.name)
def test_odd_words_after_a_command(
    command: CheckedCommand, places: dict[str, str], tried: Tried, amount: int
) -> None:
    @examples(amount, command_lines(tried, places))
    def check(line: list[str]) -> None:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            command(*line)

    check()


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize("tried", COMMANDS, ids=lambda tried: tried.name)
def test_a_command_without_words_says_what_it_needs(
    command: CheckedCommand,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tried: Tried,
) -> None:
    monkeypatch.chdir(tmp_path)
    needed = [p for p in tried.parameters if p.required]
    assert command(*tried.words) == (2 if needed or tried.name in NEED_MORE else 0)
