"""Initial weights of a network from those of another one, trained with any method, and the official SiT and DiT checkpoints.

A DiT that was trained at s = t alone (Flow Matching, diffusion) computes the same at every s at the start: its second time is
embedded anew, with an output layer of zeros whose bias is the embedding that it always had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from soflow_core.networks import Architecture, DiTConfig, NetworkModule, UNetConfig
from soflow_core.networks.dit import FREQUENCIES, MAX_PERIOD, PARITY, SecondTime
from soflow_core.objectives import Diffusion, FlowMatching, SoFlow
from soflow_core.weights import (
    Weights,
    WeightsError,
    infer_config,
    plain_name,
    read_torch_file,
    require_finite,
)

Layout = Literal["soflow", "sit", "dit"]
"""Whose conventions of time and output a checkpoint in torch's own format follows."""
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Which = Literal["ema", "raw"]

ONE_TIME = ("flow_matching", "diffusion")
"""Methods that train a network at s = t alone."""
TRUNK = ("hidden", "depth", "heads", "mlp_ratio", *(name for name in PARITY if name != "velocity_blocks"))
"""Settings in which the two networks must agree: all layers between input and output have these sizes."""
SECOND_TIMES: dict[SecondTime, str] = {"difference": "t - s", "time": "s", "none": "none"}
"""What the second embedding is given, as a sentence has it."""
ENDS = {"x_embedder.": "the patch embedding", "final_layer.linear.": "the output layer"}
KEYS: dict[Which, tuple[str, ...]] = {"ema": ("ema_model", "ema"), "raw": ("model",)}
"""Names of the weights in checkpoints of the official code of SoFlow, SiT and DiT."""


@dataclass(frozen=True)
class Fit:
    """How the weights of one network are taken over by another."""

    copied: tuple[str, ...]
    """Tensors that are taken as they are."""
    notes: tuple[str, ...]
    """What is not taken as it is, one phrase each; none where the network is that of the weights."""


def fit(source: Weights, target: Architecture, method: str) -> Fit:
    """What of a network's weights another one takes that is trained with `method`.

    `source` needs no tensors: shapes follow from its configuration. Raises WeightsError where they are networks of two kinds, where
    the trunks of two DiTs differ, or the conditions that have tokens, and where two other networks differ in what tensors depend on.
    """
    old = source.network_config
    if not isinstance(old, DiTConfig) or not isinstance(target, DiTConfig):
        return _fit_alike(source, target, method)
    for name in TRUNK:
        before, now = getattr(old, name), getattr(target, name)
        if before != now:
            raise WeightsError(
                f"the weights are those of a network with {name} {_shown(before)} and this one has {_shown(now)}: give both the same"
            )
    if old.second_time not in (target.second_time, "none"):
        raise WeightsError(
            f"the weights are those of a network whose second time is {SECOND_TIMES[old.second_time]} and this one's is "
            f"{SECOND_TIMES[target.second_time]}: it would read the one as the other, so start from other weights"
        )
    if target.condition_tokens and _conditions(old) != _conditions(target):
        raise WeightsError(
            f"the weights are those of a network with condition tokens for {_conditions(old)} and this one has them for "
            f"{_conditions(target)}: a new token has an effect from the start, so give both the same conditions"
        )
    shapes, wanted = _shapes(old), _shapes(target)
    notes = [
        f"{title} is new ({_sizes(old)} before, {_sizes(target)} now)"
        for prefix, title in ENDS.items()
        if any(shapes[name] != wanted[name] for name in wanted if name.startswith(prefix))
    ]
    if shapes["pos_embed"] != wanted["pos_embed"]:
        notes.append(f"positions are those of {target.height} x {target.width}")
    trained = None if source.objective is None else source.objective.method
    anew = target.second_time != "none" and second_time_is_new(trained, method)
    if anew:
        notes.append("the embedding of the second time is new and has no effect at the start")
    notes += _label_notes(old, target)
    notes += _guidance_notes(old, target)
    if (trained == "diffusion") != (method == "diffusion"):
        notes.append(
            f"{trained or 'the old method'} and {method} predict different things, at times of other ranges"
        )
    new_head = old.velocity_blocks != target.velocity_blocks
    if new_head:
        notes.append(
            "the head for the velocity is new, a copy of the last blocks and the output layer"
            if target.velocity_blocks
            else "there is no head for the velocity any longer"
        )
    own = (
        "y_embedder.",
        "w_embedder.",
        *([] if old.guidance_interval else ["start_embedder.", "end_embedder."]),
        *(["s_embedder."] if anew else []),
        *(["velocity_"] if new_head else []),
    )
    copied = [n for n in wanted if shapes.get(n) == wanted[n] and not n.startswith(own)]
    return Fit(tuple(copied), tuple(notes))


def _fit_alike(source: Weights, target: Architecture, method: str) -> Fit:
    """The fit of networks that are not two DiTs: every tensor is taken. Raises WeightsError where settings that decide them differ."""
    old = source.network_config
    if isinstance(old, UNetConfig) and isinstance(target, UNetConfig) and old.classes == target.classes:
        # No tensor of a U-Net depends on these, and files of other code do not say its dropout.
        old = replace(old, dropout=target.dropout, null_label=target.null_label)
    if old != target:
        differing = [name for name, value in vars(old).items() if value != vars(target).get(name, value)]
        named = f" ({', '.join(differing)})" if type(old) is type(target) else ""
        raise WeightsError(
            f"the weights are those of a {old.title} and this network is a {target.title}: give both the same settings{named}"
        )
    notes = []
    if second_time_is_new(None if source.objective is None else source.objective.method, method):
        notes.append("the second time is embedded as it was, and was trained at s = t alone")
    if target.null_label and not source.network_config.null_label:
        notes.append("the null label is new, a vector of zeros")
    return Fit(tuple(_shapes(target)), tuple(notes))


def _guidance_notes(old: DiTConfig, target: DiTConfig) -> list[str]:
    """What changes in the guidance conditions. Raises WeightsError where an interval is a condition no longer."""
    if old.guidance_interval and not target.guidance_interval:
        raise WeightsError(
            "the weights are those of a network with a guidance interval as a condition and this one has none: give guidance.start and "
            "guidance.end ranges"
        )
    notes = []
    if old.guidance_scale != target.guidance_scale:
        notes.append(
            "the guidance scale is a new condition without effect at the start"
            if target.guidance_scale
            else "the guidance scale is no condition any longer and has the effect of scale 1"
        )
    if target.guidance_interval and not old.guidance_interval:
        notes.append("the guidance interval is a new condition without effect at the start")
    return notes


def _conditions(config: DiTConfig) -> str:
    """The conditions of a network, in words."""
    names = (
        ("the guidance scale", config.guidance_scale),
        ("its interval", config.guidance_interval),
        ("labels", config.classes is not None),
    )
    times = "one time" if config.times == 1 else "two times"
    return ", ".join([times, *(name for name, there in names if there)])


def _shown(value: bool | float) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def second_time_is_new(trained: str | None, method: str) -> bool:
    """Whether a network of `trained` has not learned a second time that `method` uses."""
    return trained in ONE_TIME and method not in ONE_TIME


@torch.no_grad()
def start_from(network: NetworkModule, source: Weights, method: str) -> Fit:
    """Give a network with fresh weights those of another one, in place, as `fit` says. Raises WeightsError where they do not fit."""
    old, target = source.network_config, network.config
    found = fit(source, target, method)
    tensors, state = source.tensors, network.state_dict()
    for name in found.copied:
        if name in tensors:
            state[name].copy_(tensors[name])
        elif not name.startswith("s_embedder."):
            raise WeightsError(f"the weights lack {name}, which a network of this configuration has")
    if not isinstance(old, DiTConfig) or not isinstance(target, DiTConfig):
        return found
    if target.velocity_blocks != old.velocity_blocks:
        _copy_head(state, target)
    trained = None if source.objective is None else source.objective.method
    anew = second_time_is_new(trained, method) or "s_embedder.mlp.2.weight" not in tensors
    if anew and target.second_time != "none":
        state["s_embedder.mlp.2.weight"].zero_()
        state["s_embedder.mlp.2.bias"].copy_(_embedding_of_zero(tensors, "s_embedder.", old.hidden))
    constant = state["s_embedder.mlp.2.bias" if target.difference_alone else "t_embedder.mlp.2.bias"]
    if target.guidance_scale and old.guidance_scale:
        for name in state:
            if name.startswith("w_embedder."):
                state[name].copy_(tensors[name])
    elif old.guidance_scale:
        constant += _embedding_of_zero(tensors, "w_embedder.", old.hidden).to(constant)
    _take_labels(state, tensors, old, target, constant)
    return found


def _copy_head(state: Mapping[str, Tensor], target: DiTConfig) -> None:
    """Fill the head for the velocity from the last blocks and the output layer of the other one."""
    first = target.depth - target.velocity_blocks
    for name, tensor in state.items():
        if name.startswith("velocity_blocks."):
            _, number, rest = name.split(".", 2)
            tensor.copy_(state[f"blocks.{first + int(number)}.{rest}"])
        elif name.startswith("velocity_layer."):
            tensor.copy_(state[name.replace("velocity_layer", "final_layer")])


def _take_labels(
    state: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    old: DiTConfig,
    target: DiTConfig,
    constant: Tensor,
) -> None:
    """Fill the label table; without one, add the null label's row of the old table to `constant`."""
    name = "y_embedder.embedding_table.weight"
    rows = tensors.get(name)
    if target.classes is None:
        if rows is not None and old.null_label:
            constant += rows[-1].to(constant)
        return
    table = state[name]
    if rows is None:
        # Labels have no effect until they are learned.
        table.zero_()
    elif old.classes == target.classes:
        known = min(len(rows), len(table))
        table[:known].copy_(rows[:known])
        if target.null_label and not old.null_label:
            table[-1].copy_(rows.mean(dim=0))


def _label_notes(old: DiTConfig, target: DiTConfig) -> list[str]:
    if old.classes is None and target.classes is None:
        return []
    if target.classes is None:
        return [
            "there are no labels any longer"
            + ("" if old.null_label else ", and no null label says what without means")
        ]
    if old.classes is None:
        return ["labels are new and have no effect at the start"]
    if old.classes != target.classes:
        return [f"the label table is new ({old.classes} classes before, {target.classes} now)"]
    if target.null_label and not old.null_label:
        return ["the null label is new, the mean of all labels"]
    if old.null_label and not target.null_label:
        return ["there is no null label any longer"]
    return []


def _shapes(config: Architecture) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in config.build().state_dict().items()}


def _sizes(config: DiTConfig) -> str:
    return f"{config.channels} channels in patches of {config.patch}"


def _embedding_of_zero(tensors: Mapping[str, Tensor], prefix: str, hidden: int) -> Tensor:
    """(hidden,): the embedding of time 0 by the embedder of this name, zeros where there is none."""
    if f"{prefix}mlp.0.weight" not in tensors:
        return torch.zeros(hidden)
    names = (f"{prefix}mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))
    # At least float32: half precision has few operations on a CPU.
    dtype = torch.promote_types(tensors[f"{prefix}mlp.0.weight"].dtype, torch.float32)
    first, shift, second, bias = (tensors[name].to(dtype) for name in names)
    sinusoids = torch.cat([torch.ones(FREQUENCIES // 2), torch.zeros(FREQUENCIES // 2)]).to(dtype)
    return second @ torch.nn.functional.silu(first @ sinusoids + shift) + bias


def read_checkpoint(
    path: str | Path, target: Architecture, which: Which = "ema", layout: Layout | None = None
) -> Weights:
    """Reads a checkpoint in torch's own format, as tensors only: of the official code of SoFlow, SiT or DiT.

    Shapes give the architecture; heads and null label, which they do not show, are those of `target`. The weights are those of a
    network in this package's conventions. Without `layout` it is SoFlow's where the file has two time embeddings. Raises
    WeightsError where it has one and `layout` is not given, and for files that are no such checkpoint.
    """
    if not isinstance(target, DiTConfig):
        raise WeightsError(f"{path} is a checkpoint of a DiT, and this network is a {target.title}")
    tensors = _named_tensors(read_torch_file(path), which, path)
    require_finite(tensors, path)
    two_times = "s_embedder.mlp.0.weight" in tensors
    if layout is None and not two_times:
        raise WeightsError(
            f"{path} has one time embedding, and its shapes do not show whose conventions it follows: say sit or dit"
        )
    if (layout or "soflow") == "soflow" and not two_times:
        raise WeightsError(
            f"{path} is no SoFlow checkpoint: it lacks s_embedder.mlp.0.weight; say sit or dit"
        )
    table = tensors.get("y_embedder.embedding_table.weight")
    null = table is not None and (target.classes is None or len(table) == target.classes + 1)
    try:
        config = infer_config(tensors, target.heads, null)
    except WeightsError:
        raise
    except (ValueError, LookupError, ZeroDivisionError) as error:
        raise WeightsError(f"{path} is not a DiT checkpoint: {error}") from error
    config = replace(config, mlp_ratio=target.mlp_ratio if _same_mlp(config, target) else config.mlp_ratio)
    if layout in (None, "soflow"):
        return Weights(config, SoFlow(), tensors=tensors)
    _keep_first_half(tensors, config)
    if layout == "dit":
        return Weights(config, Diffusion(), tensors=tensors)
    _reverse_time(tensors)
    return Weights(config, FlowMatching(), tensors=tensors)


def _same_mlp(config: DiTConfig, target: DiTConfig) -> bool:
    """Whether the inner widths agree: a ratio that is read from shapes is rounded."""
    return config.hidden == target.hidden and int(config.hidden * config.mlp_ratio) == int(
        target.hidden * target.mlp_ratio
    )


def _named_tensors(content: Any, which: Which, path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, or of a bare state dict, without the prefixes of wrappers."""
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds {type(content).__name__} and no weights")
    found = next((content[key] for key in KEYS[which] if isinstance(content.get(key), dict)), None)
    if found is None:
        bare = bool(content) and all(isinstance(value, Tensor) for value in content.values())
        if not bare or which == "raw":
            raise WeightsError(
                f"{path} has none of {', '.join(KEYS[which])}; it holds {', '.join(map(str, list(content)[:8]))}"
            )
        # Published weights stand alone; they are averaged ones.
        found = content
    named = {plain_name(str(name)): value for name, value in found.items() if isinstance(value, Tensor)}
    if "pos_embed" not in named or "x_embedder.proj.weight" not in named:
        raise WeightsError(f"{path} is not a DiT checkpoint: it lacks pos_embed or x_embedder.proj.weight")
    return named


def _keep_first_half(tensors: dict[str, Tensor], config: DiTConfig) -> None:
    """Leave out the output channels beyond those of the input: a variance that DiT learns and SiT drops."""
    rows = config.patch**2 * config.channels
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        tensor = tensors[name]
        if len(tensor) == 2 * rows:
            by_pixel = tensor.unflatten(0, (config.patch**2, 2 * config.channels))
            tensors[name] = by_pixel[:, : config.channels].flatten(0, 1).contiguous()


def _reverse_time(tensors: dict[str, Tensor]) -> None:
    """From a velocity towards data at a time of 1 for data, as in SiT, to one towards noise at a time of 1 for noise.

    With w the frequencies, cos(w (1 - t)) and sin(w (1 - t)) are linear in cos(w t) and sin(w t): the first layer takes both.
    """
    weight = tensors["t_embedder.mlp.0.weight"]
    half = weight.shape[1] // 2
    frequency = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float64) / half)
    cosine, sine = frequency.cos(), frequency.sin()
    of_cos, of_sin = weight.double().split(half, dim=1)
    turned = [of_cos * cosine + of_sin * sine, of_cos * sine - of_sin * cosine]
    tensors["t_embedder.mlp.0.weight"] = torch.cat(turned, dim=1).to(weight.dtype)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        tensors[name] = -tensors[name]
