"""Checkpoints of published code: official SoFlow (DiT and U-Net), and α-Flow, MeanFlow in PyTorch, SiT.

They differ in the names of the time embeddings and in what these are given, which no shape shows. A network with one time, as
SiT's, predicts the velocity; where its noise is at time 0, weights are changed so that it is at 1, as everywhere here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from soflow_core.failures import summarize
from soflow_core.networks.dit import FREQUENCIES, MAX_PERIOD, SecondTime
from soflow_core.objectives import OBJECTIVES
from soflow_core.published_unet import is_unet, unet_weights
from soflow_core.weights import (
    Weights,
    WeightsError,
    infer_config,
    plain_name,
    read_torch_file,
    require_finite,
    require_stored,
)

Kept = Literal["ema", "model"]
KEYS: dict[Kept, tuple[str, ...]] = {"ema": ("ema_model", "ema"), "model": ("model", "net")}
"""Names under which a checkpoint has its averaged and its trained weights."""
PATCHES = "x_embedder.proj.weight"
BESIDE = ("autoencoder.", "logvar_net.", "are_ldm_stats_inited", "autoencoder_mean", "autoencoder_var")
"""What α-Flow's checkpoints hold beside the network; the statistics of latents are read, the rest is left."""
METHODS = {
    ("t_embedder", "s_embedder"): "soflow",
    ("noise_labels_embedder", "noise_labels_next_embedder"): "alphaflow",
    ("t_embedder", "r_embedder"): "meanflow",
    ("t_embedder", "h_embedder"): "meanflow",
    ("t_embedder",): "flow_matching",
}
"""Names of the embeddings of the time and of the second time -> method of the code that calls them so."""


@dataclass(frozen=True)
class Conventions:
    """What a network was trained with and its tensors do not show."""

    heads: int | None = None
    """Needed where width and depth are those of no named size."""
    null_label: bool | None = None
    """Whether the last row of the label table is the null label, as in guided models; needed where there is a table."""
    second_time: Literal["difference", "time"] = "difference"
    """What the second embedding is given: t - s, as by SoFlow, MeanFlow and α-Flow, or s."""
    noise_at: Literal[0, 1] | None = None
    """The time of pure noise; needed for a network with one time: 0 for SiT."""


def read_published(path: str | Path, which: Kept = "ema", conventions: Conventions | None = None) -> Weights:
    """Reads a checkpoint of published code, as tensors only; shapes give the architecture.

    The method is that of the code whose names the tensors have, with its default settings. Where the checkpoint says how its latents
    are normalized, `data` has their `scaling` and `shift`. Raises WeightsError where a
    convention is needed and not given, and for a file of anything else, with the first tensor that does not fit.
    """
    conventions = conventions or Conventions()
    named = _weights_of(read_torch_file(path), which, path)
    plain = {plain_name(name): tensor for name, tensor in named.items()}
    if is_unet(plain):
        require_stored(plain, path)
        require_finite(plain, path)
        return unet_weights(plain, path)
    tensors, beside = _network_of(plain, path)
    require_stored(tensors, path)
    require_finite(tensors, path)
    try:
        normalization = _normalization(beside)
        names = _embeddings(tensors)
        tensors, second_time = _renamed(tensors, names, conventions)
        tensors = _without_variances(tensors)
        config = infer_config(tensors, conventions.heads, conventions.null_label)
    except WeightsError:
        raise
    except (ValueError, LookupError, ZeroDivisionError) as error:
        raise WeightsError(f"{path} is not a DiT checkpoint: {summarize(error)}") from error
    config = replace(config, second_time=second_time)
    return Weights(config, OBJECTIVES[METHODS[names]](), normalization, tensors)


def _weights_of(content: Any, which: Kept, path: str | Path) -> dict[str, Tensor]:
    """The tensors that were asked for; those of the file itself where it is a state dict and no more."""
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {type(content).__name__} and no weights")
    state = next((content[key] for key in KEYS[which] if key in content), None)
    if state is None and (any(str(name).endswith(PATCHES) for name in content) or is_unet(content)):
        state = content
    named = state.items() if isinstance(state, dict) else ()
    tensors = {str(name): tensor for name, tensor in named if isinstance(tensor, Tensor)}
    if not tensors:
        held = ", ".join(map(str, content)) or "nothing"
        raise WeightsError(f"{path} has no {' or '.join(KEYS[which])}; it holds {held[:200]}")
    return tensors


def _network_of(plain: Mapping[str, Tensor], path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of the network, by their names in it; what lies beside it)."""
    found = [name for name in plain if name.endswith(PATCHES)]
    prefix = found[0].removesuffix(PATCHES) if len(found) == 1 else ""
    inside = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
    if len(found) != 1 or "pos_embed" not in inside:
        raise WeightsError(f"{path} is not a DiT checkpoint: it lacks pos_embed or {PATCHES}")
    beside = {name: tensor for name, tensor in plain.items() if not name.startswith(prefix)}
    if not prefix:
        beside = {name: inside.pop(name) for name in list(inside) if name.startswith(BESIDE)}
    unknown = next((name for name in beside if not name.startswith(BESIDE)), None)
    if unknown is not None:
        raise WeightsError(
            f"{path} has {unknown} beside the network {prefix.rstrip('.')}, which is not known"
        )
    return inside, beside


def _normalization(beside: Mapping[str, Tensor]) -> dict[str, float]:
    """`scaling` and `shift` of latents by α-Flow's statistics; {} where there are none. Raises WeightsError for several of them."""
    mean, variance = beside.get("autoencoder_mean"), beside.get("autoencoder_var")
    if mean is None or variance is None:
        return {}
    for name, values in (("autoencoder_mean", mean), ("autoencoder_var", variance)):
        if values.numel() == 0 or not torch.isfinite(values).all() or (values != values.flatten()[0]).any():
            raise WeightsError(
                f"its latents are normalized by channel or place ({name}), and one scaling and one shift are all that is known here"
            )
    deviation = math.sqrt(float(variance.flatten()[0]) + 1e-16)
    return {"scaling": 1 / deviation, "shift": float(mean.flatten()[0])}


def _embeddings(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of the time embeddings, a key of METHODS. Raises WeightsError for others."""
    found = {name.partition(".mlp.")[0] for name in tensors if ".mlp.0." in name}
    found = {name for name in found if not name.startswith("blocks.")}
    names = next((known for known in METHODS if set(known) == found), None)
    if names is None:
        known = "; ".join(f"{' and '.join(each)} ({method})" for each, method in METHODS.items())
        raise WeightsError(
            f"its embeddings of times are {', '.join(sorted(found)) or 'none'}; known are {known}"
        )
    return names


def _renamed(
    tensors: Mapping[str, Tensor], names: tuple[str, ...], conventions: Conventions
) -> tuple[dict[str, Tensor], SecondTime]:
    """The tensors with the time embeddings' names here, and how the second time enters."""
    places = dict(zip(names, ("t_embedder", "s_embedder"), strict=False))
    renamed = {}
    for name, tensor in tensors.items():
        head, dot, rest = name.partition(".")
        renamed[places.get(head, head) + dot + rest] = tensor
    if len(names) == 2:
        if conventions.noise_at == 0:
            raise WeightsError("a network with two times has its noise at 1")
        return renamed, conventions.second_time
    if conventions.noise_at is None:
        raise WeightsError(
            "it has one embedding of the time, and its tensors do not say whether the noise is at 0, as in SiT, or at 1"
        )
    return (_reversed(renamed) if conventions.noise_at == 0 else renamed), "none"


def _reversed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a velocity whose time runs the other way: v'(x, t) = -v(x, 1 - t).

    The sinusoids of 1 - t are a rotation of those of t, which the first layer of the embedding takes on; the last layer changes sign.
    """
    changed = dict(tensors)
    first = tensors["t_embedder.mlp.0.weight"]
    half = FREQUENCIES // 2
    if first.shape[1] != FREQUENCIES:
        raise WeightsError(
            f"its embedding of the time has {first.shape[1]} sinusoids, {FREQUENCIES} are known"
        )
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float64) / half)
    cosines, sines = first.double().split(half, dim=1)
    rotated = torch.cat(
        [
            cosines * frequencies.cos() + sines * frequencies.sin(),
            cosines * frequencies.sin() - sines * frequencies.cos(),
        ],
        dim=1,
    )
    changed["t_embedder.mlp.0.weight"] = rotated.to(first.dtype)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        changed[name] = -tensors[name]
    return changed


def _without_variances(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the second half of the output channels where there are twice as many as inputs, as in SiT."""
    _, channels, patch, _ = tensors[PATCHES].shape
    cut = dict(tensors)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = tensors[name]
        if len(rows) == 2 * patch * patch * channels:
            by_channel = rows.reshape(patch * patch, 2 * channels, *rows.shape[1:])
            cut[name] = by_channel[:, :channels].reshape(-1, *rows.shape[1:]).contiguous()
    return cut
