"""Kernel settings of a step, and that the process has its previous settings back afterwards."""

import subprocess
import sys

import pytest
import torch

from soflow_core.kernels import step_kernels, tf32

# The switches are those of a GPU; they can be set and read without one.
GPU = torch.device("cuda")
NEW_NAMES = hasattr(torch.backends.cuda.matmul, "fp32_precision") if torch.__version__ >= "2.9" else False


def switches() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("before", ["highest", "high"])
def test_float32_is_float32_also_in_convolutions_unless_tf32_is_allowed(allowed: bool, before: str) -> None:
    kept = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision(before)
        outside = switches()
        with step_kernels(GPU, allowed, deterministic=False):
            assert switches() == (allowed, allowed)
        assert switches() == outside
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(kept[0])
        torch.backends.cudnn.allow_tf32 = kept[1]


def test_a_step_on_a_cpu_leaves_the_switches_alone() -> None:
    before = switches()
    with step_kernels(torch.device("cpu"), not before[0], deterministic=False):
        assert switches() == before


@pytest.mark.skipif(not NEW_NAMES, reason="torch has these names since 2.9")
def test_a_process_that_sets_tf32_by_its_newer_names_trains_all_the_same() -> None:
    # In a process of its own: the two sets of names cannot be mixed again afterwards.
    code = """
import torch
torch.backends.cuda.matmul.fp32_precision = "tf32"
from soflow_core.kernels import tf32
matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
before = matmul.fp32_precision, conv.fp32_precision
for allowed, name in ((False, "ieee"), (True, "tf32")):
    with tf32(allowed):
        assert (matmul.fp32_precision, conv.fp32_precision) == (name, name)
    assert (matmul.fp32_precision, conv.fp32_precision) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_settings_come_back_after_a_failure() -> None:
    before = switches()
    with pytest.raises(RuntimeError, match="within"), tf32(not before[0]):
        raise RuntimeError("within")
    assert switches() == before
