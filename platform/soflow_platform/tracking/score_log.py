"""Scores and comparisons on MLflow runs and registered versions."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soflow_pipelines.storage.files import parse_json

if TYPE_CHECKING:
    from mlflow import MlflowClient


CODE = "code"
"""Among the settings of a score: the digest of the code that computed it."""


class ScoreLog:
    """Scores on a run and on a registered version, either of which may be None; a tag holds the settings of each score."""

    def __init__(self, client: MlflowClient, run: str | None, version: tuple[str, str] | None) -> None:
        self._client, self._run, self._version = client, run, version
        self._run_tags: dict[str, str] = {}
        self._version_tags: dict[str, str] = {}
        if run is not None:
            self._run_tags = dict(client.get_run(run).data.tags)
        if version is not None:
            self._version_tags = dict(client.get_model_version(*version).tags)

    def settings(self, name: str) -> list[dict[str, Any]]:
        """The settings of the score of this name on the run, on the version, or on both; empty where a tag holds none."""
        tag = _settings_tag(name)
        return [_parsed(tags[tag]) for tags in (self._run_tags, self._version_tags) if tag in tags]

    def add(self, name: str, value: float, settings: Mapping[str, Any], step: int) -> None:
        """Log a score on the run and on the version, unless it is there already; one that other code computed is replaced."""
        tag, text = _settings_tag(name), json.dumps(settings, sort_keys=True)
        if self._run is not None and not _has(self._run_tags, tag, settings):
            self._client.log_metric(self._run, name, value, int(time.time() * 1000), step)
            self._client.set_tag(self._run, tag, text)
            self._run_tags[tag] = text
        if self._version is not None and not _has(self._version_tags, tag, settings):
            self._client.set_model_version_tag(*self._version, name, repr(value))
            self._client.set_model_version_tag(*self._version, tag, text)
            self._version_tags[tag] = text


def _parsed(text: str) -> dict[str, Any]:
    """The settings in a tag, which anybody with access to the server can write."""
    try:
        settings = parse_json(text)
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _has(tags: Mapping[str, str], tag: str, settings: Mapping[str, Any]) -> bool:
    """Whether a score of these settings is there that the same code computed; scores of earlier versions do not say which did."""
    return tag in tags and _parsed(tags[tag]).get(CODE) == settings.get(CODE)


def _settings_tag(name: str) -> str:
    return f"{name}.settings"


def log_comparison(client: MlflowClient, run: str, files: Sequence[Path], conclusions: Sequence[str]) -> None:
    """Log the files of a comparison and its conclusions on the sweep's run."""
    for file in files:
        client.log_artifact(run, str(file), "comparison")
    client.set_tag(run, "comparison.conclusions", " ".join(conclusions))
