"""Scores on the run and on the registered version that they belong to, each with every setting that moves it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from soflow_platform.errors import JobError
from soflow_platform.jobs.evaluate import Score
from soflow_platform.subjects import Subject
from soflow_platform.tracking import client_for

PREFIX = "evaluate/"


def log_scores(subject: Subject, scores: Sequence[Score], tracking_uri: str) -> list[str]:
    """Log what is not there yet. Returns the names of all metrics; none where the subject belongs to no run and no version.

    A metric is named by what people vary, as in `evaluate/fid50k_nfe1_uniform`; a tag of the same name holds all settings. Where that
    name is taken by other settings, their digest tells them apart. Raises JobError where the tracking store refuses.
    """
    from mlflow.exceptions import MlflowException

    if subject.run is None and subject.version is None:
        return []
    try:
        return [name for score in scores for name in _log(subject, score, tracking_uri)]
    except MlflowException as error:
        first = str(error).strip().splitlines()[0]
        raise JobError(
            f"the scores are kept, but {tracking_uri} did not take them ({first}): the same command logs them."
        ) from error


def _log(subject: Subject, score: Score, tracking_uri: str) -> list[str]:
    client = client_for(tracking_uri)
    tags: dict[str, str] = {}
    if subject.run is not None:
        tags = client.get_run(subject.run).data.tags
    if subject.version is not None:
        tags = {**tags, **client.get_model_version(*subject.version).tags}
    settings = json.dumps({**score.tags, "flags": score.flags}, sort_keys=True)
    names = []
    for metric, value in score.values.items():
        name = metric_name(metric, score.tags)
        if tags.get(_settings_tag(name), settings) != settings:
            name = f"{name}_{score.digest[:6]}"
        names.append(name)
        if tags.get(_settings_tag(name)) == settings:
            continue
        if subject.run is not None:
            client.log_metric(subject.run, name, value, int(time.time() * 1000), subject.step or 0)
            client.set_tag(subject.run, _settings_tag(name), settings)
        if subject.version is not None:
            client.set_model_version_tag(*subject.version, name, repr(value))
            client.set_model_version_tag(*subject.version, _settings_tag(name), settings)
    return names


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
