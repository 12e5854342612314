"""Weights files: safetensors with a JSON header; and files of torch, read as tensors alone."""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import secrets
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from soflow_core.failures import InputError, summarize
from soflow_core.networks import NETWORKS, SIZES, Architecture, DiTConfig, NetworkModule
from soflow_core.objectives import OBJECTIVES, Objective
from soflow_core.plugins import as_records, check_recorded, named_in, plugins_of
from soflow_core.registration import parts_in
from soflow_core.samplers.base import SAMPLERS
from soflow_core.samplers.grids import GRIDS
from soflow_core.settings import to_dict

T = TypeVar("T")

HEADER = "soflow"
WRAPPERS = ("module.", "network.", "_orig_mod.")
"""Prefixes of DDP, of the official code's model and of torch.compile."""
FORMAT = 1
SMALL_FILE = 2**20
"""Bytes beyond the size of a file that what it holds may always have."""


class WeightsError(InputError, ValueError):
    """Raised for a file of weights that cannot be used."""


@dataclass(frozen=True)
class Weights:
    """Weights of a network, with its architecture, method and data."""

    network_config: Architecture
    objective: Objective | None
    """Method that it was trained with; None where the file does not contain it."""
    data: dict[str, Any] = field(default_factory=dict)
    """Metadata of the training data, as JSON values."""
    tensors: dict[str, Tensor] = field(default_factory=dict)


def save_weights(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    network: Architecture,
    objective: Objective,
    data: Mapping[str, Any],
) -> None:
    """Writes a safetensors file atomically."""
    path = Path(path)
    metadata = weights_header(network, objective, data)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        save_file(plain, aside, metadata=metadata)
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def weights_header(network: Architecture, objective: Objective, data: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file of weights: architecture, method and data as JSON under one key."""
    header = {
        "format": FORMAT,
        "network": to_dict(network),
        "objective": to_dict(objective),
        "data": dict(data),
    }
    plugins = needed_plugins(network, objective)
    if plugins:
        header["plugins"] = plugins
    return {HEADER: json.dumps(header, sort_keys=True)}


def needed_plugins(network: Architecture, objective: Objective) -> list[dict[str, str]]:
    """Names and digests of the plugins that reading and sampling such weights needs."""
    grid = str(getattr(objective, "sampling_grid", "")).partition(":")[0]
    sampled = SAMPLERS.get(str(getattr(objective, "sampler", ""))), GRIDS.get(grid)
    named = [part() for part in sampled if part is not None]
    return as_records(plugins_of(*parts_in(network), *parts_in(objective), *named))


def load_weights(path: str | Path) -> Weights:
    """Reads a file written by save_weights. Raises WeightsError for any other file, and where a weight is not finite."""
    header, tensors = _read_file(
        Path(path),
        lambda file: {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
    )
    require_finite(tensors, path)
    return Weights(*header, tensors)


def read_header(path: str | Path) -> tuple[Weights, int]:
    """The header of a file written by save_weights, without its tensors, and the number of its parameters.

    Raises WeightsError for any other file.
    """
    header, parameters = _read_file(
        Path(path),
        lambda file: sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys()),  # noqa: SIM118
    )
    return Weights(*header), parameters


def require_finite_file(path: str | Path) -> None:
    """Raises WeightsError for a file that save_weights has not written, or with a weight that is not finite.

    It holds one tensor in memory at a time.
    """

    def check(file: Any) -> None:
        for name in file.keys():  # noqa: SIM118
            require_finite({name: file.get_tensor(name)}, path)

    _read_file(Path(path), check)


def _read_file(
    path: Path, read: Callable[[Any], T]
) -> tuple[tuple[Architecture, Objective, dict[str, Any]], T]:
    """The header of a weights file, and what `read` takes of the open file."""
    try:
        with safe_open(path, framework="pt") as file:
            return _read_header((file.metadata() or {}).get(HEADER)), read(file)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a complete safetensors file ({error})") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"the {HEADER} header of {path} cannot be used: {error}") from error


def _read_header(text: str | None) -> tuple[Architecture, Objective, dict[str, Any]]:
    """Architecture, method and data of a header. Raises ValueError where a part is missing or of another type."""
    if text is None:
        raise ValueError("there is none; the file was not written by save_weights")
    try:
        header = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("it is no JSON object")
    missing = [name for name in ("format", "network", "objective", "data") if name not in header]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if type(header["format"]) is not int or header["format"] != FORMAT:
        raise ValueError(
            f"it has format {header['format']!r} and this version reads {FORMAT}; use a newer version"
        )
    network, settings, data = (_object(header, name) for name in ("network", "objective", "data"))
    try:
        parts = NETWORKS.read(network), OBJECTIVES.read(settings)
    except ValueError as error:
        raise ValueError(f"{error}{named_in(header.get('plugins'))}") from None
    check_recorded(header.get("plugins"))
    return (*parts, data)


def _object(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = header[name]
    if not isinstance(value, dict):
        raise ValueError(f"its {name} is no JSON object")
    return value


def require_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises WeightsError where a tensor has a value that is not finite."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise WeightsError(
                f"{path} has weights that are not finite ({name}): it comes from a training that failed, or is damaged"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether every value of a tensor is finite."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    # A sum has a value that is not finite where one of its terms is not. It takes one pass and no memory; where it overflows, or is
    # none of the type's, each value is looked at.
    if tensor.element_size() > 2 and torch.isfinite(tensor.sum()):
        return True
    # Tensors of 8 bits have few operations of their own.
    values = tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(values).all())


def build_network(weights: Weights) -> NetworkModule:
    """Network with these weights, in eval mode.

    Shapes are compared before memory is taken. Raises WeightsError where weights and architecture disagree.
    """
    least = weights.network_config.least_tensors
    if least > len(weights.tensors):
        raise WeightsError(
            f"a {weights.network_config.title} has more tensors than the {len(weights.tensors)} of the file"
        )
    try:
        with torch.device("meta"):
            network = weights.network_config.build()
    except RuntimeError as error:
        raise WeightsError(f"a network of this configuration cannot be made: {summarize(error)}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
    for name, shape in expected.items():
        if name not in stored:
            raise WeightsError(f"the weights lack {name}, which a network of this configuration has")
        if stored[name] != shape:
            raise WeightsError(f"the weights have {name} of shape {stored[name]}; the network needs {shape}")
    extra = sorted(set(stored) - set(expected))
    if extra:
        raise WeightsError(
            f"the weights have {extra[0]!r}, which a network of this configuration does not have"
        )
    network.to_empty(device="cpu").load_state_dict(weights.tensors)
    return network.eval()


def read_torch_file(path: str | Path, mmap: bool = False) -> Any:
    """Content of a file in torch's own format, as tensors and plain containers; code in it is never run.

    With `mmap` the tensors stay in the file, which must not be changed while they are used.
    Raises WeightsError where it holds more than that, or is damaged.
    """
    try:
        _refuse_packed(path)
        # The arguments of a training script, which many checkpoints hold; unpickling a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors, which only running its code would read; save its state dicts alone"
        ) from error
    except Exception as error:
        # The reader has no class of error of its own: damaged files end it in many ways.
        raise WeightsError(f"{path} is not a complete checkpoint file: {summarize(error)}") from error


def plain_name(name: str) -> str:
    """The name without the prefixes of what a network was wrapped in, in whatever order it was."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def infer_config(tensors: Mapping[str, Tensor], heads: int | None, null_label: bool | None) -> DiTConfig:
    """Architecture of a DiT by the shapes of its tensors. Raises WeightsError where they do not say all of it."""
    hidden, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    side = math.isqrt(tensors["pos_embed"].shape[1]) * patch
    table = tensors.get("y_embedder.embedding_table.weight")
    if heads is None:
        heads = next((h for width, layers, h in SIZES.values() if (width, layers) == (hidden, depth)), None)
    if heads is None:
        raise WeightsError(f"no named size has width {hidden} and depth {depth}; say how many heads it has")
    if table is not None and null_label is None:
        raise WeightsError(
            f"the label table has {len(table)} rows; say whether the last one is the null label, as in guided models"
        )
    return DiTConfig(
        channels=channels,
        height=side,
        width=side,
        patch=patch,
        hidden=hidden,
        depth=depth,
        heads=heads,
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / hidden,
        classes=None if table is None else len(table) - bool(null_label),
        null_label=table is not None and bool(null_label),
    )


def _refuse_packed(path: str | Path) -> None:
    """Raises WeightsError for a file in torch's format that would unpack to more than it has; torch stores tensors as they are."""
    size = os.path.getsize(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > 2 * size + SMALL_FILE:
            raise WeightsError(
                f"{path} has {size:,} bytes, its parts {unpacked:,}: it is compressed, or damaged"
            )


def require_stored(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises WeightsError where tensors have far more values than their file has bytes, as views that repeat one value have."""
    size, needed = os.path.getsize(path), sum(tensor.nbytes for tensor in tensors.values())
    if needed > 2 * size + SMALL_FILE:
        raise WeightsError(
            f"{path} has {size:,} bytes, its tensors {needed:,}: they are no weights as they are saved"
        )
