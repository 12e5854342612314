"""Finds a sweep's training data and checks that it fits the configured network."""

from __future__ import annotations

from pathlib import Path

from soflow_pipelines.preparation.builtin import BUILTIN, Expected, ensure_builtin
from soflow_pipelines.shards.info import DatasetInfo, ShardError
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import UserError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.model import network_config


def expected(experiment: Experiment) -> Expected | None:
    """Sample shape and classes as far as the configuration says them. Raises UserError where built-in data have others."""
    source, wanted = experiment.data.source, experiment.data
    if source is not None and source in BUILTIN:
        data = BUILTIN[source]
        for name, given, actual in (
            ("shape", wanted.shape, data.shape),
            ("classes", wanted.classes, data.classes),
        ):
            if given is not None and given != actual:
                raise UserError(
                    f"data.{name} is {given} and data.source {source} has {actual}: leave data.{name} out."
                )
        return data
    if experiment.data.shape is None:
        return None
    return Expected(experiment.data.shape, experiment.data.classes)


def how_to_make(experiment: Experiment) -> str:
    """The end of an error sentence: the command that makes the missing data, and the setting that names them."""
    autoencoder = experiment.data.autoencoder
    target = "a set of pixels with `soflowctl data prepare IMAGES"
    if autoencoder is not None:
        target = f"latents with `soflowctl data prepare IMAGENET_FOLDER --autoencoder {autoencoder}"
    return f"make {target} --out FOLDER` and pass --set data.source=FOLDER"


def check_data(experiment: Experiment) -> Expected:
    """Sample shape and classes of a sweep's data. Creates nothing.

    Raises UserError where the data source is not set, is missing, or does not fit the network.
    """
    source = _source(experiment)
    if source in BUILTIN:
        expected(experiment)
        return BUILTIN[source]
    info = _read(experiment, _location(source))
    network_config(experiment, info)
    return Expected(tuple(info.shape), info.classes)


def open_data(experiment: Experiment, storage: ProjectFolder) -> tuple[str, DatasetInfo]:
    """Location and description of the shard set; built-in data is written on first use.

    Raises UserError where the data is missing or does not fit the configured network.
    """
    source = _source(experiment)
    location = _location(source)
    if source in BUILTIN:
        expected(experiment)
        location = str(ensure_builtin(source, storage.data / source))
    info = _read(experiment, location)
    network_config(experiment, info)
    return location, info


def _source(experiment: Experiment) -> str:
    """The data source: a built-in data set, a URI, or a folder that exists. Raises UserError where it is none of them."""
    source = experiment.data.source
    if source is None:
        raise UserError(f"data.source is not set: {how_to_make(experiment)}.")
    if source not in BUILTIN and "://" not in source and not Path(source).is_dir():
        raise UserError(f"data.source {source!r} is not a folder: {how_to_make(experiment)}.")
    return source


def _location(source: str) -> str:
    """The source as a URI or an absolute path, for workers with another working folder."""
    return source if "://" in source else str(Path(source).absolute())


def _read(experiment: Experiment, location: str) -> DatasetInfo:
    # Reading needs pyarrow, which takes longer to import than a sweep file to check.
    from soflow_pipelines.shards.tables import read_info

    try:
        return read_info(location)
    except (ShardError, OSError) as error:
        source = experiment.data.source
        raise UserError(
            f"data.source {source!r} cannot be read: {error} Otherwise {how_to_make(experiment)}."
        ) from None
