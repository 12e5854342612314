"""Copies in host memory of nested states: dictionaries, lists and tuples of tensors and plain values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from soflow_core.sharding import whole


def map_tensors(state: Any, change: Callable[[Tensor], Any]) -> Any:
    """Copy of a nested state with `change` applied to every tensor."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: map_tensors(value, change) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map_tensors(value, change) for value in state)
    return state


class HostCopy:
    """Reusable host memory for copies of a state, pinned for tensors of a GPU.

    Each copy overwrites the one before it: use another HostCopy where both are needed.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, state: Any, keep: bool = True) -> Any:
        """Copy of a state, with full tensors, that shares no memory with it.

        A collective where tensors are sharded; a rank that does not `keep` the copy gets {}.
        """
        used = 0
        waiting: set[torch.device] = set()

        def copy(tensor: Tensor) -> Tensor | None:
            nonlocal used
            tensor = whole(tensor)
            if not keep:
                return None
            buffer = self._buffer(used, tensor)
            used += 1
            buffer.copy_(tensor, non_blocking=True)
            if tensor.device.type != "cpu":
                waiting.add(tensor.device)
            return buffer

        copied = map_tensors(state, copy)
        for device in waiting:
            torch.accelerator.synchronize(device)
        return copied if keep else {}

    def _buffer(self, index: int, tensor: Tensor) -> Tensor:
        """Buffer of the index-th tensor of a state, replaced where the tensor does not fit."""
        kept = self._buffers[index : index + 1]
        if not kept or (kept[0].shape, kept[0].dtype) != (tensor.shape, tensor.dtype):
            kept = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")]
            self._buffers[index : index + 1] = kept
        return kept[0]
