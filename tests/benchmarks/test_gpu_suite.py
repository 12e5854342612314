"""benchmarks/gpu.sh in its small form: every section gives numbers on a CPU, without Ray, MLflow and WebDataset."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bare_loops import DECAY, FLOW_MATCHING, LOOPS, OFFICIAL, PLAIN, BareLoop
from gpu_steps import network_of, ratios, row_name
from measurements import Results
from sd_decoder import Decoder
from soflow_core.networks import DiT
from soflow_core.objectives import OBJECTIVES, Batch, FlowMatching, SoFlow
from soflow_core.optimizer import OptimizerConfig
from soflow_core.train_step import TrainStep, TrainStepConfig

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
    assert measured == {f"tiny/4 {row}, eager" for row in (*LOOPS, *OBJECTIVES)}
    ahead = {each.name for each in results.measurements if each.section == "steps not waited for"}
    assert ahead == {f"tiny/4 {row}, eager" for row in OBJECTIVES}
    ratios = {each.name for each in results.measurements if each.section == "steps, ratios"}
    assert ratios == {
        "tiny/4 soflow, eager / plain",
        "tiny/4 flow_matching, eager / bare loop",
        "tiny/4 soflow, eager / official's way",
        "tiny/4 soflow, eager / meanflow",
    }
    parity = [each.value for each in results.measurements if each.section == "parity"]
    assert max(parity) < 1e-3
    assert (tmp_path / "gpu-cpu.md").read_text().startswith("# gpu-cpu\n")


def small_batch() -> tuple[DiT, Batch, torch.Generator]:
    torch.manual_seed(0)
    network = DiT(network_of("tiny/4", 4, 8, 8))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    generator = torch.Generator().manual_seed(1)
    return network, Batch(torch.randn(4, 4, 8, 8, generator=generator), torch.arange(4)), generator


@pytest.mark.parametrize(("loop", "objective"), [(FLOW_MATCHING, FlowMatching()), (OFFICIAL, SoFlow())])
def test_a_bare_loop_trains_what_the_training_step_trains(
    loop: str, objective: FlowMatching | SoFlow
) -> None:
    network, batch, generator = small_batch()
    bare_network, _, _ = small_batch()
    optimizer = OptimizerConfig(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
    step = TrainStep(network, objective, TrainStepConfig(100, optimizer, (DECAY,), precision="float32"))
    bare = BareLoop(loop, bare_network, 100)
    for _ in range(3):
        draws = objective.draw(generator, 4, (4, 8, 8), conditional=True)
        record, loss = step(batch, draws), bare(batch, draws)
        assert loss == pytest.approx(record.loss, rel=1e-4)
    for name, trained in network.named_parameters():
        torch.testing.assert_close(dict(bare_network.named_parameters())[name], trained, rtol=0, atol=1e-5)
    for averaged, name in zip(bare.average, step.names, strict=True):
        torch.testing.assert_close(averaged, step.ema_state()[name], rtol=0, atol=1e-5)


def test_a_ratio_is_of_two_rows_of_one_size_and_names_a_goal_that_is_missed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = Results("gpu-test", {})
    for name, compiled, value in [
        ("soflow", False, 30.0),
        ("soflow", True, 20.0),
        (PLAIN, False, 20.0),
        (PLAIN, True, 16.0),
        (OFFICIAL, False, 80.0),
    ]:
        results.add("steps", row_name("XL/2", name, compiled), value)
    results.add("steps", row_name("XL/2", "soflow", True, graphs=True), 15.0)
    results.add("model FLOPs utilization", row_name("XL/2", "soflow", True), 40.0)
    ratios(results, ["B/2", "XL/2"])
    found = {each.name: each.value for each in results.measurements if each.section == "steps, ratios"}
    assert found == {
        "XL/2 soflow, eager / plain": 1.5,
        "XL/2 soflow, compiled / plain": 1.25,
        "XL/2 soflow, eager / official's way": 0.375,
        "XL/2 soflow, compiled / official's way": 0.25,
        "XL/2 soflow, compiled, graphs / without": 0.75,
    }
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line.rpartition(": ")[2] for line in lines if "goal" in line]
    assert verdicts == ["MISSED", "MISSED", "holds", "holds", "MISSED"]


def test_the_decoder_has_the_sizes_of_stable_diffusions() -> None:
    with torch.device("meta"):
        decoder = Decoder()
        images = decoder(torch.zeros(1, 4, 32, 32))
    assert images.shape == (1, 3, 256, 256)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 49_490_199
