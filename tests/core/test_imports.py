"""What importing the core loads: torch alone, so that reading settings stays quick."""

import subprocess
import sys

import pytest

HEAVY = ("timm", "torchvision", "torch._dynamo", "numpy.testing", "scipy", "ray", "mlflow")


def loaded_by(statement: str) -> set[str]:
    """Modules in sys.modules after a statement in a fresh interpreter."""
    program = f"import sys, torch; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "module",
    ["soflow_core.objectives", "soflow_core.optimizer", "soflow_core.settings", "soflow_core.nfe"],
)
def test_settings_and_methods_load_no_heavy_library(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert module in loaded
    assert [name for name in loaded if name.startswith(HEAVY)] == []


def test_networks_load_neither_timm_nor_torchvision() -> None:
    loaded = loaded_by("import soflow_core.networks, soflow_core.train_step, soflow_core.weights")
    assert "soflow_core.networks.dit" in loaded
    assert [name for name in loaded if name.split(".")[0] in ("timm", "torchvision")] == []
