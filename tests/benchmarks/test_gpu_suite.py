"""benchmarks/gpu.sh in its small form: every section gives numbers on a CPU, without Ray, MLflow and WebDataset."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from measurements import Results
from sd_decoder import Decoder
from soflow_core.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]
ABSENT = ("ray", "mlflow", "webdataset", "diffusers", "pydantic", "soflow_platform")


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_small_suite_measures_every_section(tmp_path: Path) -> None:
    # A package of this name that cannot be imported stands before the installed one.
    for name in ABSENT:
        (tmp_path / "absent" / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "absent" / f"{name}.py").write_text("raise ImportError('not on this machine')\n")
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "absent")}
    command = ["benchmarks/gpu.sh", "--device", "cpu", "--small", "--seconds", "300", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = Results.read(tmp_path / "gpu-cpu.json")
    assert results.skipped == {}
    sections = {each.section for each in results.measurements}
    assert {"parity", "core tests", "steps", "loader", "sampling", "digits"} <= sections
    measured = {each.name for each in results.measurements if each.section == "steps"}
    assert measured == {f"tiny/4 {method}, eager" for method in OBJECTIVES}
    parity = [each.value for each in results.measurements if each.section == "parity"]
    assert max(parity) < 1e-3
    assert (tmp_path / "gpu-cpu.md").read_text().startswith("# gpu-cpu\n")


def test_the_decoder_has_the_sizes_of_stable_diffusions() -> None:
    with torch.device("meta"):
        decoder = Decoder()
        images = decoder(torch.zeros(1, 4, 32, 32))
    assert images.shape == (1, 3, 256, 256)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 49_490_199
