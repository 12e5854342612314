"""The SoFlow paper's recipes, and the settings in which a trial departs from them.

A recipe is the part of a shipped sweep file outside `search`, so that each published number stands in one place.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from soflow_core.settings import SAMPLING, marked
from soflow_platform.config.experiment import Experiment, flatten
from soflow_platform.config.presets import sweeps_folder
from soflow_platform.config.validation import read_experiment

OF_SIZE = {"B/4": "b4", "B/2": "b2", "M/2": "m2", "L/2": "l2", "XL/2": "xl2"}
"""Published sizes for ImageNet 256 x 256 -> the sweep file with their recipe."""
LATENTS, CIFAR10 = (4, 32, 32), (3, 32, 32)
"""(C, H, W) of what the recipes are for."""
SECTIONS = ("objective", "optimizer")
TRAINING = ("steps", "batch", "ema", "ema_every", "augment", "clip_norm")
EVALUATION = ("labels", "features")


@dataclass(frozen=True)
class Recipe:
    """Published settings, flat, by the name of the sweep file that holds them."""

    name: str
    settings: dict[str, Any]


def recipe_of(experiment: Experiment) -> Recipe | None:
    """The paper's recipe for the data and network of a trial; None for other methods and for data that it has none for.

    A size that was not published is compared with B/4's.
    """
    if experiment.objective.method != "soflow":
        return None
    if experiment.data.shape == LATENTS:
        return _read(OF_SIZE.get(_size(experiment) or "", "b4"))
    if experiment.data.shape != CIFAR10 or experiment.data.conditional:
        return None
    return _read("cifar10" if hasattr(experiment.network, "size") else "cifar10-unet")


def departures(experiment: Experiment, recipe: Recipe) -> dict[str, Any]:
    """Settings in which a trial departs from a recipe: key -> the trial's value."""
    own = _settings(experiment)
    sections = {key: _below(own, key) for key in recipe.settings if key not in own}
    own |= {key: section for key, section in sections.items() if section}
    return {key: own.get(key) for key, value in recipe.settings.items() if not _same(own.get(key), value)}


@functools.cache
def _read(name: str) -> Recipe:
    return Recipe(name, _settings(read_experiment(sweeps_folder() / f"{name}.yaml")[0]))


def _settings(experiment: Experiment) -> dict[str, Any]:
    """The settings that a recipe consists of, flat."""
    resolved = experiment.resolved()
    kept = {section: resolved[section] for section in SECTIONS}
    kept["training"] = {key: resolved["training"][key] for key in TRAINING}
    kept["evaluation"] = {key: resolved["evaluation"][key] for key in EVALUATION}
    dit = hasattr(experiment.network, "size")
    kept["network"] = {"size": _size(experiment)} if dit else resolved["network"]
    # Settings of sampling decide no weights.
    sampling = {f"objective.{name}" for name in marked(experiment.objective, SAMPLING)}
    return {key: value for key, value in flatten(kept).items() if key not in sampling}


def _size(experiment: Experiment) -> str | None:
    """The named size of a DiT; None for other networks and sizes."""
    size: str | None = getattr(experiment.network, "size", None)
    return size


def _below(settings: dict[str, Any], key: str) -> dict[str, Any]:
    """What stands below a key that has a section where the recipe has a value, such as a range of guidance scales."""
    return {name.removeprefix(f"{key}."): v for name, v in settings.items() if name.startswith(f"{key}.")}


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; floats to nine digits, for a file may write 3.125e-4 or 1/3200."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-9 * max(abs(one), abs(other))
    return bool(one == other)
