"""Options of the conformance suite for metrics, data sources, feature networks and autoencoders, beside those of the core's."""

from __future__ import annotations

from typing import Any

from soflow_core.conformance.part_kinds import KINDS
from soflow_core.registration import Registry


def _metrics() -> Registry[Any]:
    from soflow_pipelines.metrics import METRICS

    return METRICS


def _sources() -> Registry[Any]:
    from soflow_pipelines.sources.opening import SOURCES

    return SOURCES


def _features() -> Registry[Any]:
    from soflow_pipelines.features.registry import FEATURES

    return FEATURES


def _autoencoders() -> Registry[Any]:
    from soflow_pipelines.images.autoencoder import AUTOENCODERS

    return AUTOENCODERS


# Imported when a test asks for them: the core's tests run where there is no Arrow.
KINDS |= {"metric": _metrics, "source": _sources, "features": _features, "autoencoder": _autoencoders}

pytest_plugins = ["soflow_core.conformance.command_line"]
