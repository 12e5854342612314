"""Files of a training's state in a checkpoint, written by several threads, and read again in either of two layouts.

A small state is one file in torch's format, `state.pt`. A large one is cut into parts, `state-000.safetensors` and so on, each of
which a thread writes, or reads, and hashes in one pass; `state.pt` then holds what is small and, in place of each large tensor, the
file and the name that it has there. Weights that a checkpoint has as `ema.safetensors` are not written a second time.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from soflow_core.failures import summarize
from soflow_core.host_copy import map_tensors
from soflow_core.weights import WeightsError, read_torch_file
from soflow_pipelines.storage.direct_file import write_hashed
from soflow_pipelines.storage.files import parse_json
from soflow_platform.storage import checkpoints
from soflow_platform.storage.checkpoint_files import FILES_AT_ONCE
from soflow_platform.storage.checkpoints import EMA, STATE, Checkpoint, part_name

PART_BYTES = 2**29
"""A part is closed by the tensor that fills it to this size."""
INLINE_BYTES = 2**16
"""Smaller tensors stay in `state.pt`: an optimizer has thousands of counters of one number."""
STATE_KEY, TENSOR_KEY = "soflow.state", "soflow.tensor"
"""Keys in the `state.pt` of a state in parts: of the state, and of a tensor's file and name."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the types in safetensors; a tensor of another type stays in `state.pt`."""
TYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class TensorFile:
    """Content of a safetensors file."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def write_state(folder: Path, state: Mapping[str, Any], weights: TensorFile | None) -> dict[str, str]:
    """Write a state, of tensors in host memory, and `weights` as `ema.safetensors` where they are given.

    Returns the SHA-256 of those files that were hashed while they were written; they are on the disk then. Raises OSError.
    """
    sizes: list[int] = []
    map_tensors(state, lambda tensor: sizes.append(tensor.nbytes))
    files = {} if weights is None else {EMA: weights}
    if sum(sizes) >= checkpoints.SPLIT_BYTES:
        cut, parts = _cut(state, {} if weights is None else weights.tensors)
        # Without a part the record would not say that the state needs other files.
        state = cut if parts else state
        files |= parts
    with ThreadPoolExecutor(FILES_AT_ONCE, "checkpoint-part") as pool:
        written = {name: pool.submit(write_tensors, folder / name, file) for name, file in files.items()}
    torch.save(state, folder / STATE)
    return {name: future.result() for name, future in written.items()}


def _cut(
    state: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, TensorFile]]:
    """A state with references in place of large tensors, and the parts that hold those that are not among the weights."""
    places = {id(tensor): (EMA, name) for name, tensor in weights.items()}
    parts: list[dict[str, Tensor]] = [{}]
    filled = 0

    def refer(tensor: Tensor) -> Any:
        nonlocal filled
        if tensor.nbytes < INLINE_BYTES or tensor.dtype not in DTYPES:
            return tensor
        if id(tensor) not in places:
            if filled >= PART_BYTES:
                parts.append({})
                filled = 0
            places[id(tensor)] = (part_name(len(parts) - 1), f"{len(parts[-1]):05d}")
            parts[-1][places[id(tensor)][1]] = tensor
            filled += tensor.nbytes
        return {TENSOR_KEY: list(places[id(tensor)])}

    cut = {STATE_KEY: map_tensors(dict(state), refer)}
    return cut, {part_name(number): TensorFile(part, {}) for number, part in enumerate(parts) if part}


def write_tensors(path: Path, content: TensorFile) -> str:
    """Write a safetensors file and return its SHA-256; it is on the disk then. Other threads run meanwhile. Raises OSError."""
    ordered = sorted(content.tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(content.metadata)} if content.metadata else {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return write_hashed(path, (start, *(_bytes_of(tensor) for _, tensor in ordered)))


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a tensor on the CPU, flat; of a copy where it is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


class TensorsInMemory:
    """Tensors of a safetensors file that was read to memory, which they share."""

    def __init__(self, content: mmap.mmap) -> None:
        """Raises ValueError where it is no such file."""
        begin = 8 + int.from_bytes(content[:8], "little")
        self._header = parse_json(content[8:begin])
        self._values = torch.frombuffer(content, dtype=torch.uint8)[begin:]
        self._begin = begin

    def get_tensor(self, name: str) -> Tensor:
        """Raises KeyError, ValueError, TypeError or RuntimeError where the file has no such tensor."""
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        dtype, values = TYPES[entry["dtype"]], self._values[begin:end]
        if (self._begin + begin) % dtype.itemsize:
            # Other writers may not align their tensors.
            values = values.clone()
        return values.view(dtype).view(entry["shape"])


@contextlib.contextmanager
def opened_state(checkpoint: Checkpoint) -> Iterator[Any]:
    """The state of a checkpoint for the length of a block.

    Parts that were kept as they were verified (`CheckpointStore.newest`) are not read again: tensors are in that memory, which is given
    back at the end. Those of other parts stay in the files.
    Raises WeightsError where it is damaged or holds more than tensors, StorageError where it cannot be had.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(checkpoint.kept.let_go)
        contents = checkpoint.kept.contents
        names = [name for name in checkpoint.files_of(STATE) if name not in contents]
        paths = dict(zip(names, stack.enter_context(checkpoint.opened_all(names)), strict=True))
        content = read_torch_file(paths[STATE], mmap=True)
        if not isinstance(content, dict) or STATE_KEY not in content:
            yield content
            return
        try:
            files: dict[str, Any] = {name: TensorsInMemory(kept) for name, kept in contents.items()}
            for name, path in paths.items():
                if name != STATE:
                    files[name] = stack.enter_context(safe_open(path, framework="pt"))
            state = _joined(content[STATE_KEY], files)
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise WeightsError(f"{checkpoint.location} is not complete: {summarize(error)}") from error
        yield state


def _joined(content: Any, files: Mapping[str, Any]) -> Any:
    """A state with the tensors in place of the references to them."""
    if isinstance(content, dict):
        if content.keys() == {TENSOR_KEY}:
            file, name = content[TENSOR_KEY]
            return files[file].get_tensor(name)
        return {key: _joined(value, files) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_joined(value, files) for value in content)
    return content
