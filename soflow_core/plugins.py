"""Plugins: modules outside the packages whose import registers parts (`@register`), each with a digest of its source.

A plugin is a module name, or the path of a `.py` file or a package. `SOFLOW_PLUGINS` and entry points of the group `soflow.plugins`
name plugins for every command; they are imported when a name is asked for that is not known yet.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from soflow_core.failures import InputError, summarize
from soflow_core.registration import Registry

VARIABLE = "SOFLOW_PLUGINS"
"""Environment variable that names plugins, with `:` (Windows `;`) between them."""
GROUP = "soflow.plugins"
"""Group of entry points that name modules; their own names are not used."""
SHOWN_DIGEST = 12


class PluginError(InputError):
    """Raised for a plugin that cannot be found or imported."""


@dataclass(frozen=True)
class Plugin:
    """An imported plugin."""

    module: str
    """Name that it is imported by."""
    path: str
    """File, or folder of a package."""
    digest: str
    """SHA-256 of the source: of the file, or of a package's list of digests and names of its `.py` files."""

    def __str__(self) -> str:
        return f"{self.module} ({self.path}, sha256 {self.digest[:SHOWN_DIGEST]})"

    def owns(self, part: type) -> bool:
        """Whether a class comes from this plugin."""
        return part.__module__ == self.module or part.__module__.startswith(f"{self.module}.")


_loaded: dict[str, Plugin] = {}
_asked = False


def loaded() -> list[Plugin]:
    """The plugins that this process has imported."""
    return list(_loaded.values())


def plugins_of(*parts: object) -> list[Plugin]:
    """The plugins that the classes of these settings come from."""
    return [plugin for plugin in loaded() if any(plugin.owns(type(part)) for part in parts)]


def load(reference: str) -> Plugin:
    """Imports a plugin by its module name or path, once in a process.

    Raises PluginError where it is not found, its import fails, or another module has its name.
    """
    path = Path(reference).expanduser()
    if path.suffix != ".py" and os.sep not in reference and "/" not in reference:
        return _load_module(reference)
    if path.is_dir():
        path = path / "__init__.py"
    if not path.is_file():
        raise PluginError(
            f"plugin {reference} is no Python file and no package: name a .py file, or an installed module"
        )
    path = path.resolve()
    package = path.name == "__init__.py"
    name = path.parent.name if package else path.stem
    if not name.isidentifier():
        raise PluginError(
            f"plugin {reference}: {name!r} is no name of a module: rename it to letters, digits and `_`"
        )
    known = sys.modules.get(name)
    if known is None:
        folders = [str(path.parent)] if package else None
        spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            _import(reference, lambda: spec.loader.exec_module(module))
        except PluginError:
            del sys.modules[name]
            raise
        known = module
    elif _source(known) != (path.parent if package else path):
        raise PluginError(
            f"plugin {reference}: a module {name} is imported already, from {_source(known)}: rename the plugin"
        )
    return _remember(known)


def load_recorded(values: Mapping[str, Any]) -> Plugin:
    """Imports a plugin that a sweep or a weights file names: from its path, or else by its name, as on another machine.

    Logs a warning where its source is not the recorded one. Raises PluginError where it is not here.
    """
    module, path, digest = (str(values.get(key) or "") for key in ("module", "path", "digest"))
    plugin = _loaded.get(module)
    try:
        if plugin is None:
            here = path and Path(path).exists()
            plugin = load(path) if here else _load_module(module)
    except PluginError as error:
        if _was_found(error):
            raise
        raise PluginError(
            f"it needs the plugin {module} (sha256 {digest[:SHOWN_DIGEST]}), which is not here: install it, or name its file in "
            f"{VARIABLE}"
        ) from None
    _compare(plugin, digest)
    return plugin


def load_named() -> None:
    """Imports the plugins that SOFLOW_PLUGINS and entry points name, once in a process. Raises PluginError."""
    global _asked
    if _asked:
        return
    from importlib import metadata

    _asked = True
    for reference in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        load(reference)
    for point in metadata.entry_points(group=GROUP):
        load(point.module)


def check_recorded(records: Any) -> None:
    """Logs a warning for each imported plugin that is another one than a weights file names."""
    for each in records if isinstance(records, list) else ():
        plugin = _loaded.get(str(each.get("module"))) if isinstance(each, dict) else None
        if plugin is not None:
            _compare(plugin, str(each.get("digest")))


def _compare(plugin: Plugin, digest: str) -> None:
    if digest and plugin.digest != digest:
        logging.getLogger(__name__).warning(
            "plugin %s is not the one that was recorded (sha256 %s): numbers may differ.",
            plugin,
            digest[:SHOWN_DIGEST],
        )


def as_records(plugins: list[Plugin]) -> list[dict[str, str]]:
    """What a weights file keeps of plugins: name and digest, no path of this machine."""
    return [{"module": plugin.module, "digest": plugin.digest} for plugin in plugins]


def named_in(records: Any) -> str:
    """The plugins of a weights file that are not imported, as the end of a sentence; empty where there are none."""
    records = [each for each in records if isinstance(each, dict)] if isinstance(records, list) else []
    records = [each for each in records if each.get("module") not in _loaded]
    if not records:
        return ""
    texts = (f"{each.get('module')} (sha256 {str(each.get('digest'))[:SHOWN_DIGEST]})" for each in records)
    return f"; it needs the plugin {', '.join(texts)}: install it, or name its file in {VARIABLE}"


def _load_module(name: str) -> Plugin:
    try:
        found = name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise PluginError(
            f"there is no module {name} to import as a plugin: install it, or give the path of its file"
        )
    return _remember(_import(name, lambda: importlib.import_module(name)))


def _import(reference: str, run: Any) -> Any:
    """The result of an import. Raises PluginError with the place of an exception in it."""
    try:
        return run()
    except InputError as error:
        raise PluginError(f"plugin {reference}: {error}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        raise PluginError(
            f"plugin {reference} cannot be imported: {type(error).__name__}: {summarize(error)}{place}"
        ) from error


def _was_found(error: PluginError) -> bool:
    """Whether a plugin is there and its import failed."""
    return error.__cause__ is not None


def _remember(module: ModuleType) -> Plugin:
    source = _source(module)
    plugin = _loaded.get(module.__name__) or Plugin(module.__name__, str(source), source_digest(source))
    _loaded[module.__name__] = plugin
    return plugin


def _source(module: ModuleType) -> Path:
    """File of a module, or folder of a package."""
    path = Path(getattr(module, "__file__", None) or module.__name__).resolve()
    return path.parent if path.name == "__init__.py" else path


def source_digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, of a line `DIGEST  NAME` for each `.py` file in it."""
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()
    lines = (f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {name}\n" for name, file in _sources(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sources(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*.py")):
        yield file.relative_to(folder).as_posix(), file


Registry.look_outside = staticmethod(load_named)
