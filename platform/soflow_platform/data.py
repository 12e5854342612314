"""Finding a sweep's training data and refusing what does not fit the configured network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from soflow_core.networks import DiTConfig, dit_config
from soflow_pipelines.shards import DataMismatch, DatasetInfo, ShardError, ensure_builtin, read_info
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import UserError
from soflow_platform.storage import Storage


@dataclass(frozen=True)
class Expected:
    """What a configuration says of its data before it is opened."""

    shape: tuple[int, ...]
    """(C, H, W)"""
    classes: int | None


BUILTIN = {"digits": Expected((1, 8, 8), 10)}
"""Real data that comes with a dependency, by name."""


def expected(experiment: Experiment) -> Expected | None:
    """Sample shape and classes as far as the configuration says them."""
    if experiment.data.source in BUILTIN:
        return BUILTIN[experiment.data.source]
    if experiment.data.shape is None:
        return None
    return Expected(experiment.data.shape, experiment.data.classes)


def how_to_make(experiment: Experiment) -> str:
    """What to do where the data of a sweep file are not there: the end of a sentence."""
    autoencoder = experiment.data.autoencoder
    made = "a set of pixels with `soflowctl data prepare IMAGES"
    if autoencoder is not None:
        made = f"latents with `soflowctl data prepare IMAGENET_FOLDER --autoencoder {autoencoder}"
    return f"make {made} --out FOLDER` and pass --set data.source=FOLDER"


def check_data(experiment: Experiment) -> str:
    """The data source, known to be named, to be there and to fit the network. Creates nothing. Raises UserError."""
    source = experiment.data.source
    if source is None:
        raise UserError(f"data.source is not set: {how_to_make(experiment)}.")
    if source in BUILTIN:
        return source
    if "://" not in source and not Path(source).is_dir():
        raise UserError(f"data.source {source!r} is not a folder: {how_to_make(experiment)}.")
    network_config(experiment, _read(experiment, _location(source)))
    return source


def open_data(experiment: Experiment, storage: Storage) -> tuple[str, DatasetInfo]:
    """The shard set's location and description; built-in data is written on first use.

    Raises UserError where the data is not there or does not fit the configured network.
    """
    source = check_data(experiment)
    location = _location(source)
    if source in BUILTIN:
        location = str(ensure_builtin(source, storage.data / source))
    info = _read(experiment, location)
    network_config(experiment, info)
    return location, info


def _location(source: str) -> str:
    """A source as workers in other folders find it."""
    return source if "://" in source else str(Path(source).absolute())


def _read(experiment: Experiment, location: str) -> DatasetInfo:
    try:
        return read_info(location)
    except (ShardError, OSError) as error:
        source = experiment.data.source
        raise UserError(
            f"data.source {source!r} cannot be read: {error} To make a set, {how_to_make(experiment)}."
        ) from None


def network_config(experiment: Experiment, info: DatasetInfo) -> DiTConfig:
    """The DiT for this data. Raises UserError where data and configuration do not fit, naming both sides."""
    wanted = experiment.data
    try:
        info.check_fits(
            wanted.shape or info.shape,
            wanted.classes,
            autoencoder=wanted.autoencoder,
            scaling=wanted.scaling,
            where=f"data.source {wanted.source}",
        )
    except DataMismatch as error:
        raise UserError(f"{error} Name other data, or change what the section data expects.") from None
    if wanted.conditional and info.classes is None:
        raise UserError(f"data.source {wanted.source} holds no labels: set data.conditional to false.")
    return describe_network(experiment, Expected(tuple(info.shape), info.classes))


def describe_network(experiment: Experiment, data: Expected) -> DiTConfig:
    """The DiT for such samples. Raises UserError where the network cannot take them."""
    channels, height, width = data.shape
    conditional = experiment.data.conditional
    classes = data.classes if conditional else None
    null_label = conditional and experiment.objective.needs_null_label
    network = experiment.network
    try:
        if network.size is not None:
            return dit_config(network.size, channels, height, width, classes=classes, null_label=null_label)
        return DiTConfig(
            channels=channels,
            height=height,
            width=width,
            patch=network.patch or 0,
            hidden=network.hidden or 0,
            depth=network.depth or 0,
            heads=network.heads or 0,
            classes=classes,
            null_label=null_label,
        )
    except ValueError as error:
        raise UserError(f"network: {error}.") from None
