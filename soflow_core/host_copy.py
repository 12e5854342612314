"""Nested states, of dictionaries, lists, tuples, tensors and plain values, and copies of them in host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from soflow_core.sharding import whole


def map_tensors(state: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nesting, in containers of its own, with every tensor replaced by what `change` makes of it."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: map_tensors(value, change) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map_tensors(value, change) for value in state)
    return state


class HostCopy:
    """Host memory for copies of states, taken once and, for a GPU's tensors, pinned.

    A copy is written over the one before it, so that must be done with, or its HostCopy be another.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def take(self, state: Any, keep: bool = True) -> Any:
        """A copy of a state, of whole tensors, that shares no memory with it.

        Of a state with shares of tensors all ranks must take one; a rank that does not `keep` gets {}.
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
        """The buffer of the index-th tensor of a state, which is made anew where the tensor does not fit."""
        kept = self._buffers[index : index + 1]
        if not kept or (kept[0].shape, kept[0].dtype) != (tensor.shape, tensor.dtype):
            kept = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")]
            self._buffers[index : index + 1] = kept
        return kept[0]
