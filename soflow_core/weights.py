"""Weights files: safetensors with a JSON header, and the official SoFlow checkpoints."""

from __future__ import annotations

import json
import math
import os
import pickle
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from soflow_core.networks import SIZES, DiT, DiTConfig
from soflow_core.objectives import OBJECTIVES, Objective
from soflow_core.settings import from_dict, to_dict

HEADER = "soflow"
FORMAT = 1


@dataclass(frozen=True)
class Weights:
    """Weights of a network, with its architecture, method and data."""

    network_config: DiTConfig
    objective: Objective | None
    """Method that it was trained with; None where the file does not contain it."""
    data: dict[str, Any] = field(default_factory=dict)
    """Metadata of the training data, as JSON values."""
    tensors: dict[str, Tensor] = field(default_factory=dict)


def save_weights(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    network: DiTConfig,
    objective: Objective,
    data: Mapping[str, Any],
) -> None:
    """Writes a safetensors file atomically."""
    path = Path(path)
    header = {
        "format": FORMAT,
        "network": to_dict(network),
        "objective": to_dict(objective),
        "data": dict(data),
    }
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        save_file(plain, aside, metadata={HEADER: json.dumps(header, sort_keys=True)})
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_weights(path: str | Path) -> Weights:
    """Reads a file written by save_weights. Raises ValueError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error
    if text is None:
        raise ValueError(f"{path} holds tensors but no {HEADER} header; it was not written by save_weights")
    header = json.loads(text)
    if header["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {header['format']} and this version reads {FORMAT}; use a newer version"
        )
    settings = header["objective"]
    if settings["method"] not in OBJECTIVES:
        raise ValueError(f"{path} was trained with {settings['method']}; known are {', '.join(OBJECTIVES)}")
    return Weights(
        network_config=from_dict(DiTConfig, header["network"]),
        objective=from_dict(OBJECTIVES[settings["method"]], settings),
        data=header["data"],
        tensors=tensors,
    )


def build_network(weights: Weights) -> DiT:
    """Network with these weights, in eval mode. Raises ValueError where weights and architecture disagree."""
    network = DiT(weights.network_config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    stored = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
    for name, shape in expected.items():
        if name not in stored:
            raise ValueError(f"the weights lack {name}, which a network of this configuration has")
        if stored[name] != shape:
            raise ValueError(f"the weights have {name} of shape {stored[name]}; the network needs {shape}")
    extra = sorted(set(stored) - set(expected))
    if extra:
        raise ValueError(f"the weights have {extra[0]}, which a network of this configuration does not have")
    network.load_state_dict(weights.tensors)
    return network.eval()


def read_official(
    path: str | Path,
    which: Literal["ema_model", "model"] = "ema_model",
    heads: int | None = None,
    null_label: bool | None = None,
) -> Weights:
    """Reads an official SoFlow checkpoint of the latent DiT, as tensors only; shapes give the architecture.

    `heads` is needed where width and depth are those of no named size. `null_label` is needed where there is a
    label table, whose shape does not show whether its last row is the null label, as it is in guided models.
    Raises ValueError where one of these is missing, or for any other file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, which only running its code would read; save its state dicts alone"
        ) from error
    if not isinstance(state, dict) or which not in state:
        content = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} has no {which}; it holds {content}")
    tensors = {_plain_name(name): tensor for name, tensor in state[which].items()}
    if "pos_embed" not in tensors or "x_embedder.proj.weight" not in tensors:
        raise ValueError(f"{path} is not a DiT checkpoint: it lacks pos_embed or x_embedder.proj.weight")
    return Weights(_infer_config(tensors, heads, null_label), objective=None, tensors=tensors)


def _plain_name(name: str) -> str:
    for prefix in ("module.", "network."):
        name = name.removeprefix(prefix)
    return name


def _infer_config(tensors: Mapping[str, Tensor], heads: int | None, null_label: bool | None) -> DiTConfig:
    hidden, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    side = math.isqrt(tensors["pos_embed"].shape[1]) * patch
    table = tensors.get("y_embedder.embedding_table.weight")
    if heads is None:
        heads = next((h for width, layers, h in SIZES.values() if (width, layers) == (hidden, depth)), None)
    if heads is None:
        raise ValueError(f"no named size has width {hidden} and depth {depth}; say how many heads it has")
    if table is not None and null_label is None:
        raise ValueError(
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
