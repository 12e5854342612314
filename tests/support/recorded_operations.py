"""A recorder that does on a CPU what a CUDA graph does on a GPU: it repeats operations on the memory that they had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from soflow_core.recorded_passes import Recorder, Work


class OperationRecorder(Recorder):
    """Counts what was recorded and replayed."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def warm_up(self, work: Work) -> None:
        work()

    def record(self, work: Work) -> Work:
        self.recorded += 1
        with _Log() as log:
            work()
        # A graph is captured without being run.
        log.undo()

        def replay() -> None:
            self.replayed += 1
            log.repeat()

        return replay


class _Log(TorchDispatchMode):
    """Operations with their arguments and results, whose memory lives as long as the log."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        """What was written to, and what it held before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number is read from the device while it is recorded")
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._keep(argument, value)
        for argument in func._schema.arguments:
            self._keep(argument, kwargs.get(argument.name))
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    def _keep(self, argument: Any, value: Any) -> None:
        if argument.alias_info is not None and argument.alias_info.is_write:
            self._before += [(each, each.detach().clone()) for each in _tensors(value)]

    @torch.no_grad()
    def undo(self) -> None:
        """Gives what was written to, also from before the recording, its content back."""
        for written, before in reversed(self._before):
            written.copy_(before)
        self._before.clear()

    @torch.no_grad()
    def repeat(self) -> None:
        for func, args, kwargs, result in self._calls:
            returns = [each.alias_info for each in func._schema.returns]
            if any(alias is not None and not alias.is_write for alias in returns):
                # A view shares memory that is written by others.
                continue
            again = func(*args, **kwargs)
            if any(alias is not None for alias in returns):
                continue
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                # Tangents of 0 have no memory.
                if not old._is_zerotensor():
                    old.copy_(new)


def _tensors(result: Any) -> list[Tensor]:
    results = result if isinstance(result, (tuple, list)) else [result]
    return [each for each in results if isinstance(each, Tensor)]
