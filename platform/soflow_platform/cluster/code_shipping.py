"""Sends the code of this process to every node of a cluster, so that a trial trains with the code that its record names.

Nodes need the libraries and, for commands that are started on them, soflow; which version of it they have installed does not matter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soflow_core.plugins import VARIABLE, Plugin, loaded

PACKAGES = ("soflow_core", "soflow_pipelines", "soflow_platform")
LEFT_OUT = ["__pycache__", "*.pyc"]
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable of a process that `ray job submit` has started: a JSON text with the job's runtime environment."""


def package_folders() -> list[str]:
    """Folders of the packages that this process runs: of a working tree, or of an installed wheel."""
    folders = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ImportError(f"{package} is not installed as a folder of files")
        folders.append(str(Path(spec.origin).parent))
    return folders


@contextlib.contextmanager
def shipped_code() -> Iterator[dict[str, Any]]:
    """Runtime environment of a job that runs this process's code on every node, to be used for `ray.init` in the block.

    The working folder of the workers is an empty one: Ray would otherwise put this process's working folder before the code that is
    sent, and another version of the code may lie there on another node. Empty where `ray job submit` sends code itself.
    """
    if _sends_code_itself():
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="soflow-job-") as folder:
        # Ray sends no folder without a file.
        (Path(folder) / "README").write_text("Working folder of soflow's workers.\n")
        yield {"working_dir": folder, "py_modules": package_folders(), "excludes": LEFT_OUT}


def with_plugins(environment: dict[str, Any]) -> dict[str, Any]:
    """The runtime environment with this process's plugins, which a worker imports when it meets a name that it does not know.

    Where `ray job submit` sends code itself, plugins have to be in what it sends.
    """
    plugins = loaded()
    if not plugins:
        return environment
    names = os.pathsep.join(plugin.module for plugin in plugins)
    found = {**environment, "env_vars": {**environment.get("env_vars", {}), VARIABLE: names}}
    if _sends_code_itself():
        return found
    # What pip has installed is on the other nodes, as the libraries are.
    places = {_top(plugin) for plugin in plugins if "site-packages" not in Path(plugin.path).parts}
    return {**found, "py_modules": [*environment.get("py_modules", ()), *sorted(places)]}


def _top(plugin: Plugin) -> str:
    """File or folder of the plugin's top-level module: of a module in a package the whole package is sent."""
    return str([Path(plugin.path), *Path(plugin.path).parents][plugin.module.count(".")])


def _sends_code_itself() -> bool:
    try:
        environment = json.loads(os.environ.get(SUBMITTED, "{}")).get("runtime_env") or {}
    except (ValueError, AttributeError):
        return False
    return "working_dir" in environment or "py_modules" in environment
