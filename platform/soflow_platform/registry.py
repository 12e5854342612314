"""Versions of registered generators, their aliases, and the gate a candidate passes to become champion."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

from soflow_platform import registered_model_path
from soflow_platform.checkpoints import EMA, Checkpoint
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import UserError
from soflow_platform.sweep_record import SweepRecord
from soflow_platform.tracking import FLAGS_TAG, Tracking, client_for

CANDIDATE = "candidate"
CHAMPION = "champion"
PREVIOUS = "soflow.previous_champion"


@dataclass(frozen=True)
class Promotion:
    """A change of champion: from which version, to which, and why it was let through."""

    model: str
    version: str
    previous: str | None
    reason: str


def register(tracking: Tracking, experiment: Experiment, record: SweepRecord, checkpoint: Checkpoint) -> str:
    """Register a checkpoint's EMA weights and set alias `candidate`. Returns the version; the same weights are registered once."""
    client = client_for(tracking.uri)
    name, best = experiment.model_name, record.best or {}
    for version in _versions(tracking.uri, name):
        if version.tags.get("soflow.sweep") == record.id:
            client.set_registered_model_alias(name, CANDIDATE, version.version)
            return str(version.version)
    child = tracking.find(record.id, best["trial"])
    version = _log_model(tracking, name, checkpoint, child.info.run_id if child else None, best["step"])
    tags = {
        "soflow.sweep": record.id,
        "soflow.trial": best["trial"],
        "soflow.step": str(best["step"]),
        "metric": experiment.search.metric,
        "mode": experiment.mode,
        **{key: repr(value) for key, value in best["metrics"].items()},
        **(
            {key: v for key, v in child.data.tags.items() if key.startswith(("eval.", "data."))}
            if child
            else {}
        ),
    }
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    client.set_registered_model_alias(name, CANDIDATE, version)
    return version


def _log_model(tracking: Tracking, name: str, checkpoint: Checkpoint, run: str | None, step: int) -> str:
    import mlflow
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    import soflow_platform

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.long, "label")]),
        outputs=Schema([ColSpec(DataType.binary, "png")]),
        params=ParamSchema(
            [ParamSpec("seed", DataType.long, default=0), ParamSpec("steps", DataType.long, default=1)]
        ),
    )
    mlflow.set_tracking_uri(tracking.uri)
    mlflow.set_registry_uri(tracking.uri)
    with mlflow.start_run(run_id=run), warnings.catch_warnings(), checkpoint.opened(EMA) as weights:
        # The signature above is exact; MLflow would rather infer one from an example.
        warnings.filterwarnings("ignore", message=".*input example.*")
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(registered_model_path()),
            artifacts={"weights": str(weights)},
            signature=signature,
            pip_requirements=[f"soflow=={soflow_platform.version()}"],
            step=step,
        )
    client = client_for(tracking.uri)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    version = client.create_model_version(name, source=info.model_uri, run_id=run, model_id=info.model_id)
    return str(version.version)


def _versions(uri: str, name: str) -> list[Any]:
    return list(client_for(uri).search_model_versions(f"name = '{name}'"))


def _aliased(uri: str, name: str, alias: str) -> Any | None:
    """The version an alias names, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return client_for(uri).get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def find_version(uri: str, model: str) -> Any:
    """The version that `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `NAME` (its candidate) means.

    Raises UserError where there is none.
    """
    name, alias, number = parse_model(model)
    known = {str(v.version): v for v in _versions(uri, name)}
    if not known:
        names = ", ".join(m.name for m in client_for(uri).search_registered_models()) or "none"
        raise UserError(f"there is no registered model {name!r} in {uri}; known are: {names}.")
    if number is not None:
        if number not in known:
            raise UserError(
                f"model {name!r} has no version {number}; it has {', '.join(sorted(known, key=int))}."
            )
        return known[number]
    version = _aliased(uri, name, alias or CANDIDATE)
    if version is None:
        hint = f"; promote one with `soflowctl promote {name}`" if alias == CHAMPION else ""
        raise UserError(f"model {name!r} has no version with alias {alias or CANDIDATE!r}{hint}.")
    return version


def parse_model(model: str) -> tuple[str, str | None, str | None]:
    """`models:/NAME@ALIAS` or `models:/NAME/VERSION` or either without `models:/` -> name, alias, version."""
    name = model.removeprefix("models:/")
    base, at, alias = name.partition("@")
    if at:
        return base, alias, None
    base, slash, number = name.partition("/")
    return base, None, number if slash else None


def promote(uri: str, model: str, force: str | None = None) -> Promotion:
    """Make a version champion if it is better than the present one on the same metric, or for the reason given.

    Raises UserError where the gate stays shut.
    """
    version = find_version(uri, model)
    name, champion = version.name, _aliased(uri, version.name, CHAMPION)
    if champion is not None and champion.version == version.version:
        raise UserError(f"version {version.version} of {name!r} is the champion already.")
    reason = f"forced: {force}" if force else _gate(version, champion)
    client = client_for(uri)
    previous = str(champion.version) if champion else None
    client.set_model_version_tag(name, version.version, PREVIOUS, previous or "")
    _record(client, name, version.version, reason)
    client.set_registered_model_alias(name, CHAMPION, version.version)
    return Promotion(name, str(version.version), previous, reason)


def rollback(uri: str, model: str) -> Promotion:
    """Make the champion before the present one champion again. Raises UserError where there was none."""
    name, _, _ = parse_model(model)
    champion = find_version(uri, f"{name}@{CHAMPION}")
    previous = champion.tags.get(PREVIOUS)
    if not previous:
        raise UserError(
            f"version {champion.version} of {name!r} is the first champion: there is none before it."
        )
    client = client_for(uri)
    reason = f"rollback from version {champion.version}"
    _record(client, name, previous, reason)
    client.set_registered_model_alias(name, CHAMPION, previous)
    return Promotion(name, previous, str(champion.version), reason)


def _gate(version: Any, champion: Any | None) -> str:
    """Why a version may become champion. Raises UserError where it may not."""
    if champion is None:
        return "first champion"
    metric = version.tags.get("metric")
    # What was said of numbers is no setting of theirs.
    settings = [k for k in version.tags if k.startswith("eval.") and k != FLAGS_TAG]
    facts = [metric, "mode", *settings]
    values = version.tags.get(metric), champion.tags.get(metric)
    differing = [k for k in facts[1:] if version.tags.get(k) != champion.tags.get(k)]
    if metric is None or None in values or differing:
        what = f"they differ in {', '.join(differing)}" if differing else f"both need {metric or 'a metric'}"
        raise UserError(
            f"version {version.version} cannot be compared with champion {champion.version}: {what}; "
            'pass --force "REASON" to promote it all the same.'
        )
    new, old = float(values[0]), float(values[1])
    if not (new < old if version.tags["mode"] == "min" else new > old):
        raise UserError(
            f"version {version.version} has {metric} {new:.4g} and champion {champion.version} has {old:.4g}: it is not "
            'better; pass --force "REASON" to promote it all the same.'
        )
    return f"{metric} {new:.6g} is better than {old:.6g}"


def _record(client: Any, name: str, version: Any, reason: str) -> None:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    client.set_model_version_tag(name, version, "soflow.promoted", f"{when} {reason}")
