"""Scores on the run and on the registered version that they belong to, each with every setting that moves it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from soflow_platform.errors import JobError
from soflow_platform.jobs.evaluate import Score, settings_digest
from soflow_platform.jobs.targets import EvaluationTarget
from soflow_platform.tracking.store import TrackingStore

PREFIX = "evaluate/"


def log_scores(subject: EvaluationTarget, scores: Sequence[Score], store: TrackingStore) -> list[str]:
    """Log what is not there yet. Returns the names of all metrics; none where the subject belongs to no run and no version.

    A metric is named by what people vary, as in `evaluate/fid50k_nfe1_uniform`; a tag of the same name holds all settings. Where that
    name is taken by other settings, a digest of what moves the number tells them apart. Run and version are looked at separately: one
    that has the number already does not keep it from the other. Raises JobError where the tracking store refuses.
    """
    from mlflow.exceptions import MlflowException

    if subject.run is None and subject.version is None:
        return []
    try:
        return [name for score in scores for name in _log(subject, score, store)]
    except MlflowException as error:
        first = str(error).strip().splitlines()[0]
        raise JobError(
            f"the scores are kept, but {store.uri} did not take them ({first}): the same command logs them."
        ) from error


def _log(subject: EvaluationTarget, score: Score, store: TrackingStore) -> list[str]:
    client = store.client
    of_run = {} if subject.run is None else client.get_run(subject.run).data.tags
    of_version = {} if subject.version is None else client.get_model_version(*subject.version).tags
    settings = json.dumps({**score.tags, "flags": score.flags}, sort_keys=True)
    names = []
    for metric, value in score.values.items():
        name = metric_name(metric, score.tags)
        if any(_is_of_others(name, score, tags) for tags in (of_run, of_version)):
            name = f"{name}_{settings_digest(_moving(score.tags))[:6]}"
        names.append(name)
        if subject.run is not None and _settings_tag(name) not in of_run:
            client.log_metric(subject.run, name, value, int(time.time() * 1000), subject.step or 0)
            client.set_tag(subject.run, _settings_tag(name), settings)
        if subject.version is not None and _settings_tag(name) not in of_version:
            client.set_model_version_tag(*subject.version, name, repr(value))
            client.set_model_version_tag(*subject.version, _settings_tag(name), settings)
    return names


def _is_of_others(name: str, score: Score, tags: Mapping[str, str]) -> bool:
    """Whether a run or a version has a number of this name that was taken with other settings."""
    said = tags.get(_settings_tag(name))
    return said is not None and _moving(json.loads(said)) != _moving(score.tags)


def _moving(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What moves a number: not the place of its reference, whose digest is there too, nor what was said of it."""
    return {key: value for key, value in settings.items() if key not in ("reference", "flags")}


def metric_name(metric: str, tags: dict[str, str]) -> str:
    """`evaluate/fid50k_nfe1_uniform`: the metric, the number of images, the evaluations for each, how labels are chosen."""
    count = int(tags["samples"])
    short = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    parts = [f"{metric}{short}"]
    if "nfe" in tags:
        parts += [f"nfe{tags['nfe']}", tags["labels"]]
    return PREFIX + "_".join(parts)


def _settings_tag(name: str) -> str:
    return f"{name}.settings"
