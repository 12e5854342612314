"""Architecture of a trial's network, checked against the training data."""

from __future__ import annotations

from soflow_core.networks import Architecture
from soflow_pipelines.preparation.builtin import Expected
from soflow_pipelines.shards.info import DataMismatch, DatasetInfo
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import UserError
from soflow_platform.training.alignment_cost import aligned_block, check_alignment


def network_config(experiment: Experiment, info: DatasetInfo) -> Architecture:
    """Architecture of the network for a data set. Raises UserError, naming both sides, where the data do not match the settings."""
    settings = experiment.data
    try:
        info.check_fits(
            settings.shape or info.shape,
            settings.classes,
            autoencoder=settings.autoencoder,
            scaling=settings.scaling,
            where=f"data.source {settings.source}",
        )
    except DataMismatch as error:
        raise UserError(f"{error} Name other data, or change what the section data expects.") from None
    if settings.conditional and info.classes is None:
        raise UserError(f"data.source {settings.source} holds no labels: set data.conditional to false.")
    if experiment.training.class_run > 1 and info.classes is None:
        raise UserError(
            f"training.class_run puts samples of one class together, and data.source {settings.source} holds no labels: set it to 1."
        )
    check_alignment(experiment, info.kind)
    return describe_network(experiment, Expected(tuple(info.shape), info.classes))


def describe_network(experiment: Experiment, data: Expected) -> Architecture:
    """Architecture of the network for samples of this shape and number of classes. Raises UserError where it cannot take them."""
    channels, height, width = data.shape
    conditional = experiment.data.conditional
    classes = data.classes if conditional else None
    # Where the file leaves the number of classes to the data, the label embedding is decided when they are read.
    null_label = classes is not None and experiment.objective.needs_null_label
    guidance_scale = classes is not None and experiment.objective.conditions_on_scale
    guidance_interval = classes is not None and experiment.objective.conditions_on_interval
    try:
        network: Architecture = experiment.network.architecture(
            channels=channels,
            height=height,
            width=width,
            classes=classes,
            null_label=null_label,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
        )
    except ValueError as error:
        raise UserError(f"network: {error}.") from None
    if experiment.objective.uses_velocity_head and not network.has_velocity_head:
        raise UserError(
            "objective.velocity_head needs a second head in the network: set network.velocity_blocks above 0 (kind dit), or "
            "objective.velocity_head to false."
        )
    if network.has_velocity_head and not experiment.objective.uses_velocity_head:
        raise UserError(
            f"network.velocity_blocks adds a second head that {experiment.objective.method} with these settings does not train: set "
            "objective.velocity_head to true (improved_meanflow), or network.velocity_blocks to 0."
        )
    if experiment.training.alignment.active:
        aligned_block(experiment, network)
    return network
