"""Versions of registered models: registers the best checkpoint of a sweep, finds versions by name, alias or number."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from soflow_platform import generation
from soflow_platform.errors import UserError
from soflow_platform.registry.candidate import Candidate
from soflow_platform.storage.checkpoints import EMA, Checkpoint
from soflow_platform.tracking.store import STEP_TAG, SWEEP_TAG, TRIAL_TAG, Tracking, TrackingStore

CANDIDATE = "candidate"
CHAMPION = "champion"
PYFUNC_FILE = Path(generation.__file__).with_name("pyfunc_model.py")
"""Copied into every registered version: what MLflow runs to load it."""


def register(tracking: Tracking, candidate: Candidate, checkpoint: Checkpoint) -> str:
    """Register a checkpoint's EMA weights and set alias `candidate`. Returns the version; the same weights are registered once."""
    client = tracking.client
    name = candidate.model
    for version in _versions(tracking.store, name):
        if version.tags.get(SWEEP_TAG) == candidate.sweep:
            client.set_registered_model_alias(name, CANDIDATE, version.version)
            return str(version.version)
    child = tracking.find(candidate.sweep, candidate.trial)
    version = _log_model(tracking, name, checkpoint, child.info.run_id if child else None, candidate.step)
    inherited = child.data.tags.items() if child else ()
    tags = {
        SWEEP_TAG: candidate.sweep,
        TRIAL_TAG: candidate.trial,
        STEP_TAG: str(candidate.step),
        "metric": candidate.metric,
        "mode": candidate.mode,
        **{key: repr(value) for key, value in candidate.metrics.items()},
        **{key: value for key, value in inherited if key.startswith(("eval.", "data."))},
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
    tracking.store.select()
    with mlflow.start_run(run_id=run), warnings.catch_warnings(), checkpoint.opened(EMA) as weights:
        # The signature above is exact; MLflow would rather infer one from an example.
        warnings.filterwarnings("ignore", message=".*input example.*")
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(PYFUNC_FILE),
            artifacts={"weights": str(weights)},
            # MLflow takes a setting at loading only where it was declared here.
            model_config={"autoencoder": None},
            signature=signature,
            pip_requirements=[f"soflow=={soflow_platform.version()}"],
            step=step,
        )
    client = tracking.client
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    version = client.create_model_version(name, source=info.model_uri, run_id=run, model_id=info.model_id)
    return str(version.version)


def _versions(store: TrackingStore, name: str) -> list[Any]:
    return list(store.client.search_model_versions(f"name = '{name}'"))


def _aliased(store: TrackingStore, name: str, alias: str) -> Any | None:
    """The version an alias names, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def find_version(store: TrackingStore, model: str) -> Any:
    """The version that `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `NAME` (its candidate) means.

    Raises UserError where there is none.
    """
    name, alias, number = parse_model(model)
    known = {str(v.version): v for v in _versions(store, name)}
    if not known:
        names = ", ".join(m.name for m in store.client.search_registered_models()) or "none"
        raise UserError(f"there is no registered model {name!r} in {store.uri}; known are: {names}.")
    if number is not None:
        if number not in known:
            raise UserError(
                f"model {name!r} has no version {number}; it has {', '.join(sorted(known, key=int))}."
            )
        return known[number]
    version = _aliased(store, name, alias or CANDIDATE)
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
