"""Copies in host memory of nested states: dictionaries, lists and tuples of tensors and plain values.

A copy is taken at once (`HostCopy.take`), or by a thread while the state is only read (`HostCopy.start`).
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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


class PendingCopy:
    """A copy of a state that a thread is taking; the state must not be changed before `hold` has returned."""

    def __init__(self, state: Any, copy: Callable[[], None] | None = None) -> None:
        """`state` is complete once `copy` has run; without it, it is complete."""
        self.held = 0.0
        """Seconds for which `hold` has waited."""
        self._state = state
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        if copy is not None:
            self._thread = threading.Thread(target=self._run, args=(copy,), name="host-copy", daemon=True)
            self._thread.start()

    def hold(self) -> None:
        """Wait until the state may be changed."""
        started = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
        self.held += time.perf_counter() - started

    def wait(self) -> Any:
        """The copy, once it is complete. Raises what copying raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._state

    def _run(self, copy: Callable[[], None]) -> None:
        try:
            copy()
        except BaseException as error:
            # An exception in a thread reaches no caller: `wait` raises it.
            self._error = error


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

    def start(self, state: Any) -> PendingCopy:
        """As `take`, by a thread; no tensor may be sharded."""
        pairs: list[tuple[Tensor, Tensor]] = []

        def place(tensor: Tensor) -> Tensor:
            pairs.append((self._buffer(len(pairs), tensor), tensor.detach()))
            return pairs[-1][0]

        copied = map_tensors(state, place)
        device = next((tensor.device for _, tensor in pairs if tensor.device.type == "cuda"), None)
        # What is queued now changes the tensors before they are copied.
        ready = None if device is None else torch.cuda.current_stream(device).record_event()
        return PendingCopy(copied, lambda: _copy(pairs, device, ready))

    def _buffer(self, index: int, tensor: Tensor) -> Tensor:
        """Buffer of the index-th tensor of a state, replaced where the tensor does not fit."""
        kept = self._buffers[index : index + 1]
        if not kept or (kept[0].shape, kept[0].dtype) != (tensor.shape, tensor.dtype):
            kept = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")]
            self._buffers[index : index + 1] = kept
        return kept[0]


def _copy(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device | None, ready: Any) -> None:
    """Copy each second tensor to the first one of its pair: those of a GPU on a stream of their own, after the event `ready`."""
    stream = None if device is None else torch.cuda.Stream(device)
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        if stream is not None:
            stream.wait_event(ready)
        for buffer, tensor in pairs:
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                # By this thread alone, without the GIL: torch would take as many threads again as training has.
                ctypes.memmove(buffer.data_ptr(), tensor.data_ptr(), tensor.nbytes)
            else:
                buffer.copy_(tensor, non_blocking=True)
    if stream is not None:
        stream.synchronize()
