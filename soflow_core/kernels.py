"""Which kernels a training step runs on: TF32 or not on a GPU, deterministic ones alone if asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch


@contextmanager
def step_kernels(device: torch.device, tf32_allowed: bool, deterministic: bool) -> Iterator[None]:
    """Inside, float32 products use TF32 on a GPU or do not, and only deterministic kernels run if asked."""
    tf32_setting = tf32(tf32_allowed) if device.type == "cuda" else nullcontext()
    with tf32_setting, deterministic_kernels() if deterministic else nullcontext():
        yield


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside, float32 matrix products and convolutions on a GPU are rounded to TF32, or are not."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    switches: list[tuple[Any, str, Any]]
    try:
        torch.get_float32_matmul_precision(), cudnn.allow_tf32
        switches = [(matmul, "allow_tf32", allowed), (cudnn, "allow_tf32", allowed)]
    except RuntimeError:
        # The process has used the names of torch 2.9, after which the older ones may not even be read.
        wanted = "tf32" if allowed else "ieee"
        switches = [(matmul, "fp32_precision", wanted), (cudnn.conv, "fp32_precision", wanted)]
    with ExitStack() as stack:
        for owner, name, value in switches:
            stack.enter_context(_switched(owner, name, value))
        yield


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Inside, an operation takes its deterministic kernel, or raises where it has none."""
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
    # Setting even the same value again is a change to the compiler, which would compile all anew.
    if before == value:
        yield
        return
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether this device has matrix units for bfloat16; a CPU without them emulates it, slower than float32."""
    if device.type == "cpu":
        return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    return device.type == "cuda"
