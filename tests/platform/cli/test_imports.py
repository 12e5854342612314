"""Commands import the libraries that they need, and no others: what is imported costs every start its seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import SweepRecord, TrialEntry
from tests.support.fresh_interpreter import last_lines

DIGITS = Path(__file__).parents[3] / "sweeps" / "digits.yaml"
HEAVY = {"torch", "torchvision", "timm", "ray", "mlflow", "numpy", "pyarrow", "pandas"}
PLANNING = {
    "torchvision",
    "timm",
    "diffusers",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "ray",
    "mlflow",
    "soflow_platform.evaluation",
    "soflow_platform.jobs",
}
COMPILER_AND_SHARDING = {"torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "sympy"}
PLANS = ["validate", "plan", "run --dry-run"]
COMMANDS = ["--help", "status", "logs", "stop", "runs", "promote --help", "ui --help"]
DRIVER = {
    "torchvision",
    "timm",
    "diffusers",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "mlflow",
    "soflow_platform.training.worker",
}
MODULES = {
    "soflow_platform.tuning.display": {"torch", "ray", "mlflow", "soflow_platform.evaluation"},
    "soflow_platform.config.validation": {
        "torchvision",
        "timm",
        "diffusers",
        "torch._dynamo",
        "ray",
        "mlflow",
    },
    "soflow_platform.tuning.sweep": DRIVER | {"ray"},
    "soflow_platform.tuning.trial_actor": DRIVER,
}
"""What modules of the driver do not import; those first that import the least."""

STEP = """
    from soflow_core.objectives import SoFlow
    from soflow_core.train_step import TrainStep, TrainStepConfig
    from tests.support.random_networks import random_inputs, random_network
    train = TrainStep(random_network(), SoFlow(), TrainStepConfig(1))
    train(*random_inputs(train.objective))
    train.load_state_dict(train.state_dict())
"""


def command(*arguments: str) -> str:
    argv = ["soflowctl", *arguments]
    return f"\n    sys.argv = {argv!r}\n    from soflow_platform.cli.main import main\n    main()\n"


def reporting(program: str, modules: set[str]) -> str:
    """The program, which prints at its end those of the modules that it has imported."""
    return (
        f"import sys\ntry:{program}finally:\n    print('LOADED', *sorted({modules!r} & set(sys.modules)))\n"
    )


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Program -> what it has imported of that which it must not. Each is a process; those of the last stage begin with torch."""
    storage = ProjectFolder(tmp_path_factory.mktemp("project"))
    SweepRecord(
        id="digits-aa11",
        name="digits",
        file="digits.yaml",
        experiment={"training": {"steps": 400, "checkpoints": None}},
        trials=[TrialEntry("trial-00", {})],
        metric="eval/fd_nfe1",
        mode="min",
    ).save(storage)
    place = ("digits-aa11", "--storage", str(storage.root))
    reading = {
        line: reporting(command(*line.split(), *(() if "--help" in line else place)), HEAVY)
        for line in COMMANDS
    }
    planning = {line: reporting(command(*line.split(), str(DIGITS)), PLANNING) for line in PLANS}
    training = {"step": reporting(STEP, COMPILER_AND_SHARDING)}
    stages = [("", reading), ("import torch", planning | training)]
    printed = last_lines(stages, tmp_path_factory.mktemp("programs"))
    words = {name: line.split() for name, line in printed.items()}
    assert {first for first, *_ in words.values()} == {"LOADED"}
    return {name: rest for name, (_, *rest) in words.items()}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_that_reads_files_imports_nothing_heavy(line: str, loaded: dict[str, list[str]]) -> None:
    assert loaded[line] == []


@pytest.mark.parametrize("line", PLANS)
def test_a_plan_needs_neither_ray_nor_mlflow_nor_the_evaluation(
    line: str, loaded: dict[str, list[str]]
) -> None:
    assert loaded[line] == []


def test_a_training_step_of_one_process_needs_neither_compiler_nor_sharding(
    loaded: dict[str, list[str]],
) -> None:
    assert loaded["step"] == []


def test_modules_of_the_driver_import_no_training_libraries() -> None:
    """In one process: what a module must not import, no module before it has imported either."""
    program = "".join(
        f"    import {module}\n    print({module!r}, *sorted({MODULES[module]!r} & set(sys.modules)))\n"
        for module in MODULES
    )
    text = f"import sys\nif True:\n{program}"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == list(MODULES), done.stderr
