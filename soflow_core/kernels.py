"""Kernel settings of a training step: TF32 on a GPU, and deterministic kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def step_kernels(device: torch.device, tf32_allowed: bool, deterministic: bool) -> Iterator[None]:
    """Context in which GPU matrix products may use TF32 or not, and operations are deterministic if requested."""
    tf32_setting = tf32(tf32_allowed) if device.type == "cuda" else nullcontext()
    with tf32_setting, deterministic_kernels() if deterministic else nullcontext():
        yield


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Context in which float32 matrix products and convolutions on a GPU use TF32, or do not."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    switches: list[tuple[Any, str, Any]]
    try:
        torch.get_float32_matmul_precision(), cudnn.allow_tf32
        switches = [(matmul, "allow_tf32", allowed), (cudnn, "allow_tf32", allowed)]
    except RuntimeError:
        # The process has used the setting names of torch 2.9, after which torch refuses to read the older ones.
        precision = "tf32" if allowed else "ieee"
        switches = [(matmul, "fp32_precision", precision), (cudnn.conv, "fp32_precision", precision)]
    with ExitStack() as stack:
        for owner, name, value in switches:
            stack.enter_context(_switched(owner, name, value))
        yield


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Context in which an operation uses its deterministic kernel, or raises RuntimeError where it has none."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@contextmanager
def _switched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    # torch.compile recompiles everything after an assignment, even of the same value.
    if before == value:
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; a CPU without it emulates it, slower than float32."""
    if device.type == "cpu":
        return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    return device.type == "cuda"
