"""Logs scores on the run and on the registered version that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from soflow_core.failures import summarize
from soflow_platform.errors import JobError
from soflow_platform.jobs.evaluate import Score, settings_digest
from soflow_platform.jobs.targets import EvaluationTarget
from soflow_platform.storage.code_digest import running_code
from soflow_platform.tracking.score_log import CODE, ScoreLog
from soflow_platform.tracking.store import TrackingStore

PREFIX = "evaluate/"


def log_scores(target: EvaluationTarget, scores: Sequence[Score], store: TrackingStore) -> list[str]:
    """Log the scores that are not logged yet. Returns the names of all metrics; none where the target has no run and no version.

    A metric is named by what people vary, as in `evaluate/fid50k_nfe1_uniform`; a tag of the same name holds all settings. Where that
    name is taken by other settings, a digest of the settings is appended; a score that other code computed is replaced. Run and
    version are looked at separately: one that has the score does not keep it from the other. Raises JobError where the tracking store
    refuses.
    """
    from mlflow.exceptions import MlflowException

    if target.run is None and target.version is None:
        return []
    try:
        log = ScoreLog(store.client, target.run, target.version)
        return [name for score in scores for name in _log(log, score, target.step or 0)]
    except MlflowException as error:
        raise JobError(
            f"the scores are kept, but {store.uri} did not take them ({summarize(error)}): the same command logs them."
        ) from error


def _log(log: ScoreLog, score: Score, step: int) -> list[str]:
    names = []
    for metric, value in score.values.items():
        name = metric_name(metric, score.tags)
        if any(_deciding(other) != _deciding(score.tags) for other in log.settings(name)):
            name = f"{name}_{settings_digest(_deciding(score.tags))[:6]}"
        log.add(name, value, {**score.tags, "flags": score.flags, CODE: running_code().digest}, step)
        names.append(name)
    return names


def _deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide a value: without flags, code, and the place of its reference, whose digest is another setting."""
    return {key: value for key, value in settings.items() if key not in ("reference", "flags", CODE)}


def metric_name(metric: str, tags: dict[str, str]) -> str:
    """`evaluate/fid50k_nfe1_uniform`: metric, number of images, function evaluations of each, and how labels are chosen."""
    count = int(tags["samples"])
    short = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    parts = [f"{metric}{short}"]
    if "nfe" in tags:
        parts += [f"nfe{tags['nfe']}", tags["labels"]]
    return PREFIX + "_".join(parts)
