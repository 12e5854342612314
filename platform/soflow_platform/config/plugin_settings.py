"""The setting `plugins` of a sweep file: modules that register parts, with the digests of their sources."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from soflow_core import plugins
from soflow_platform.config.sections import Section


class PluginConfig(Section):
    """A plugin as it was imported."""

    module: str
    path: str = ""
    """Where it was on the machine that the sweep was started on."""
    digest: str = ""
    """SHA-256 of its source."""


def _imported(value: Any) -> Any:
    """Import what a sweep file names, or what a record holds. Raises PluginError."""
    if isinstance(value, str):
        plugin = plugins.load(value)
    elif isinstance(value, dict) and isinstance(value.get("module"), str):
        plugin = plugins.load_recorded(value)
        return {"path": plugin.path, "digest": plugin.digest, **value}
    else:
        return value
    return {"module": plugin.module, "path": plugin.path, "digest": plugin.digest}


Plugins = Annotated[tuple[Annotated[PluginConfig, BeforeValidator(_imported)], ...], Field(max_length=64)]
