"""Options of the conformance suite for metrics, data sources and feature networks, beside those of the core's."""

from __future__ import annotations

from soflow_core.conformance.command_line import KINDS
from soflow_pipelines.features.registry import FEATURES
from soflow_pipelines.metrics import METRICS
from soflow_pipelines.sources.opening import SOURCES

KINDS |= {"metric": METRICS, "source": SOURCES, "features": FEATURES}

pytest_plugins = ["soflow_core.conformance.command_line"]
