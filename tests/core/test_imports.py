"""What importing the core loads: torch alone, so that reading settings stays quick."""

import json

import pytest

from tests.support.fresh_interpreter import last_lines

HEAVY = ("timm", "torchvision", "torch._dynamo", "numpy.testing", "scipy", "ray", "mlflow")
SETTINGS = ("soflow_core.objectives", "soflow_core.optimizer", "soflow_core.settings", "soflow_core.nfe")
TRAINING = "soflow_core.networks, soflow_core.train_step, soflow_core.weights"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Modules -> what importing them loads in an interpreter that has torch."""
    program = "import json, sys\nbefore = set(sys.modules)\nimport {}\nprint(json.dumps([*set(sys.modules) - before]))"
    programs = {modules: program.format(modules) for modules in (*SETTINGS, TRAINING)}
    printed = last_lines([("import torch", programs)], tmp_path_factory.mktemp("loaded"))
    return {modules: set(json.loads(line)) for modules, line in printed.items()}


@pytest.mark.parametrize("module", SETTINGS)
def test_settings_and_methods_load_no_heavy_library(module: str, loaded: dict[str, set[str]]) -> None:
    assert module in loaded[module]
    assert [name for name in loaded[module] if name.startswith(HEAVY)] == []


def test_networks_load_neither_timm_nor_torchvision(loaded: dict[str, set[str]]) -> None:
    assert "soflow_core.networks.dit" in loaded[TRAINING]
    assert [name for name in loaded[TRAINING] if name.split(".")[0] in ("timm", "torchvision")] == []
