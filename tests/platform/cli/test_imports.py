"""Commands import the libraries that they need, and no others: what is imported costs every start its seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import SweepRecord, TrialEntry

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


def loaded(program: str, modules: set[str]) -> set[str]:
    """Those of the modules that a process has imported at its end."""
    report = f"    print('LOADED', *sorted({modules!r} & set(sys.modules)))\n"
    text = f"import sys\ntry:\n{program}finally:\n{report}"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("LOADED"), done.stderr
    return set(last.split()[1:])


def command(*arguments: str) -> str:
    argv = ["soflowctl", *arguments]
    return f"    sys.argv = {argv!r}\n    from soflow_platform.cli.main import main\n    main()\n"


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_that_reads_files_imports_nothing_heavy(storage: ProjectFolder, line: str) -> None:
    SweepRecord(
        id="digits-aa11",
        name="digits",
        file="digits.yaml",
        experiment={"training": {"steps": 400, "checkpoints": None}},
        trials=[TrialEntry("trial-00", {})],
        metric="eval/fd_nfe1",
        mode="min",
    ).save(storage)
    names = [] if "--help" in line else ["digits-aa11", "--storage", str(storage.root)]
    assert loaded(command(*line.split(), *names), HEAVY) == set()


@pytest.mark.parametrize("line", ["validate", "plan", "run --dry-run"])
def test_a_plan_needs_neither_ray_nor_mlflow_nor_the_evaluation(line: str) -> None:
    assert loaded(command(*line.split(), str(DIGITS)), PLANNING) == set()


def test_a_training_step_of_one_process_needs_neither_compiler_nor_sharding() -> None:
    step = (
        "    from soflow_core.objectives import SoFlow\n"
        "    from soflow_core.train_step import TrainStep, TrainStepConfig\n"
        "    from tests.support.random_networks import random_inputs, random_network\n"
        "    train = TrainStep(random_network(), SoFlow(), TrainStepConfig(1))\n"
        "    train(*random_inputs(train.objective))\n"
        "    train.load_state_dict(train.state_dict())\n"
    )
    assert loaded(step, COMPILER_AND_SHARDING) == set()


def test_modules_of_the_driver_import_no_training_libraries() -> None:
    """In one process: what a module must not import, no module before it has imported either."""
    program = "".join(
        f"    import {module}\n    print({module!r}, *sorted({MODULES[module]!r} & set(sys.modules)))\n"
        for module in MODULES
    )
    text = f"import sys\nif True:\n{program}"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == list(MODULES), done.stderr
