"""Versions of registered models: registers the best checkpoint of a sweep, finds versions by name, alias or number."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soflow_core.networks import NETWORKS
from soflow_core.weights import read_header, require_finite_file
from soflow_platform import generation
from soflow_platform.errors import UserError
from soflow_platform.registry.candidate import Candidate
from soflow_platform.registry.card import describe, model_card, plugin_text, short_card
from soflow_platform.registry.stored_scores import NotComparableError, stored_scores
from soflow_platform.registry.tags import (
    IMAGES_TAG,
    METHOD_TAG,
    NETWORK_TAG,
    PARAMETERS_TAG,
    PLUGINS_TAG,
    RECIPE_TAG,
    TRIALS_TAG,
)
from soflow_platform.registry.version_list import name_filter
from soflow_platform.storage.checkpoints import EMA, Checkpoint
from soflow_platform.storage.code_digest import CODE_TAG
from soflow_platform.tracking.page_texts import grids_text
from soflow_platform.tracking.store import STEP_TAG, SWEEP_TAG, TRIAL_TAG, Tracking, TrackingStore

CANDIDATE = "candidate"
CHAMPION = "champion"
DESCRIPTION_FILE = "model.json"
CARD_FILE = "README.md"
GRID_FILE = "samples.png"
PYFUNC_FILE = Path(generation.__file__).with_name("pyfunc_model.py")
"""Copied into every registered version: what MLflow runs to load it."""


@dataclass(frozen=True)
class NewVersion:
    """Weights to be registered, with what is kept beside them."""

    name: str
    """Name of the registered model."""
    weights: Path
    """Weights file, `ema.safetensors`."""
    description: Mapping[str, Any]
    """What `model.json` holds; see `card.describe`."""
    tags: Mapping[str, str]
    run: str | None = None
    """MLflow run that the weights are of."""
    step: int = 0
    grids: Sequence[Path] = ()
    """Sample grids; the first is kept."""


@dataclass(frozen=True)
class Proposal:
    """A version that a sweep registered."""

    version: str
    outdone_by: str | None
    """Why another version keeps the alias `candidate`; None where this one has it."""


def register(tracking: Tracking, candidate: Candidate, checkpoint: Checkpoint) -> str:
    """Register a checkpoint's EMA weights and set alias `candidate`. Returns the version; the same weights are registered once."""
    version = _add_checkpoint(tracking, candidate, checkpoint)
    tracking.client.set_registered_model_alias(candidate.model, CANDIDATE, version)
    return version


def propose(tracking: Tracking, candidate: Candidate, checkpoint: Checkpoint) -> Proposal:
    """Register a checkpoint's EMA weights; alias `candidate` moves to them where its version is no better by the scores of training.

    A version that was scored otherwise keeps the alias: which of the two is better is not known.
    """
    store, name = tracking.store, candidate.model
    before = aliased(store, name, CANDIDATE)
    version = _add_checkpoint(tracking, candidate, checkpoint)
    if before is not None and str(before.version) != version:
        try:
            scores = stored_scores(find_version(store, f"{name}/{version}"), before)
        except NotComparableError as error:
            return Proposal(version, f"version {before.version} was scored otherwise ({error})")
        if not scores.better:
            return Proposal(
                version,
                f"version {before.version} has {scores.metric} {scores.old:.6g}, this {scores.new:.6g}",
            )
    tracking.client.set_registered_model_alias(name, CANDIDATE, version)
    return Proposal(version, None)


def _add_checkpoint(tracking: Tracking, candidate: Candidate, checkpoint: Checkpoint) -> str:
    """The version with a checkpoint's EMA weights, which is made where there is none."""
    origin = {SWEEP_TAG: candidate.sweep, TRIAL_TAG: candidate.trial, STEP_TAG: str(candidate.step)}
    for version in versions_of(tracking.store, candidate.model):
        if origin.items() <= version.tags.items():
            return str(version.version)
    child = tracking.find(candidate.sweep, candidate.trial)
    inherited = child.data.tags if child else {}
    tags = {
        **origin,
        "metric": candidate.metric,
        "mode": candidate.mode,
        IMAGES_TAG: str(checkpoint.state.images),
        RECIPE_TAG: json.dumps(candidate.recipe),
        TRIALS_TAG: str(candidate.trials),
        **({CODE_TAG: checkpoint.state.code} if checkpoint.state.code else {}),
        **{key: repr(value) for key, value in candidate.metrics.items()},
        **{key: value for key, value in inherited.items() if key.startswith(("eval.", "data.", "start."))},
    }
    evaluation = {
        "metric": candidate.metric,
        "mode": candidate.mode,
        "metrics": dict(candidate.metrics),
        "settings": {key: value for key, value in inherited.items() if key.startswith("eval.")},
    }
    facts = {
        "sweep": candidate.sweep,
        "trial": candidate.trial,
        "step": candidate.step,
        "images": checkpoint.state.images,
        "commit": inherited.get("mlflow.source.git.commit"),
        "code": checkpoint.state.code,
        "recipe": dict(candidate.recipe),
        "started_from": checkpoint.state.start,
    }
    with checkpoint.opened(EMA) as weights:
        new = NewVersion(
            name=candidate.model,
            weights=weights,
            description=describe_weights(weights, facts, evaluation),
            tags=tags,
            run=child.info.run_id if child else None,
            step=candidate.step,
            grids=[Path(grid) for grid in candidate.grids],
        )
        return _add_version(tracking, new)


def describe_weights(
    weights: Path, origin: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """The description of a weights file; see `card.describe`. Raises WeightsError where a weight is not finite."""
    require_finite_file(weights)
    header, parameters = read_header(weights)
    return describe(header, origin, parameters, evaluation)


def register_weights(tracking: Tracking, new: NewVersion) -> str:
    """Register a version with its description and card, and set alias `candidate`. Returns the version."""
    version = _add_version(tracking, new)
    tracking.client.set_registered_model_alias(new.name, CANDIDATE, version)
    return version


def _add_version(tracking: Tracking, new: NewVersion) -> str:
    client, name = tracking.client, new.name
    source, model_id = _log_model(tracking, new)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    created = client.create_model_version(name, source=source, run_id=new.run, model_id=model_id)
    version = str(created.version)
    facts = {
        METHOD_TAG: new.description["method"],
        NETWORK_TAG: NETWORKS.read(new.description["network"]).title,
        PARAMETERS_TAG: str(new.description["parameters"]),
    }
    if plugin_text(new.description):
        facts[PLUGINS_TAG] = plugin_text(new.description)
    for key, value in {**new.tags, **facts}.items():
        client.set_model_version_tag(name, version, key, value)
    card = short_card(model_card(f"{name}/{version}", new.description))
    grids = grids_text(client, new.run) if new.run else ""
    client.update_model_version(name, version, f"{card}\n\n{grids}".strip())
    return version


def _log_model(tracking: Tracking, new: NewVersion) -> tuple[str, str]:
    """Log the weights with everything beside them as an MLflow model. Returns its URI and id."""
    import mlflow
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    import soflow_platform

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.long, "label")]),
        outputs=Schema([ColSpec(DataType.binary, "png")]),
        params=ParamSchema(
            [
                ParamSpec("seed", DataType.long, default=0),
                ParamSpec("steps", DataType.long, default=new.description["sampling"]["steps"]),
            ]
        ),
    )
    tracking.store.select()
    with (
        mlflow.start_run(run_id=new.run, experiment_id=None if new.run else tracking.experiment_id),
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory(prefix="soflow-version-") as folder,
    ):
        # The signature above is exact; MLflow would rather infer one from an example.
        warnings.filterwarnings("ignore", message=".*input example.*")
        info = mlflow.pyfunc.log_model(
            name=new.name,
            python_model=str(PYFUNC_FILE),
            # MLflow takes a setting at loading only where it was declared here.
            model_config={"autoencoder": None},
            artifacts={"weights": str(new.weights), **_files_beside(new, Path(folder))},
            signature=signature,
            pip_requirements=[f"soflow=={soflow_platform.version()}"],
            step=new.step,
        )
    return info.model_uri, info.model_id


def _files_beside(new: NewVersion, folder: Path) -> dict[str, str]:
    """The files that are kept beside the weights, written to a folder: artifact name -> path."""
    description, card = folder / DESCRIPTION_FILE, folder / CARD_FILE
    description.write_text(json.dumps(new.description, indent=1, ensure_ascii=False), encoding="utf-8")
    card.write_text(model_card(f"{new.name}/VERSION", new.description), encoding="utf-8")
    files = {"description": str(description), "card": str(card)}
    for grid in [path for path in new.grids if path.is_file()][:1]:
        files["grid"] = shutil.copy(str(grid), str(folder / GRID_FILE))
    return files


def versions_of(store: TrackingStore, name: str) -> list[Any]:
    """All versions of a registered model."""
    wanted = name_filter(name)
    return [] if wanted is None else list(store.client.search_model_versions(wanted))


def aliased(store: TrackingStore, name: str, alias: str) -> Any | None:
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
    known = {str(v.version): v for v in versions_of(store, name)}
    if not known:
        names = ", ".join(m.name for m in store.client.search_registered_models()) or "none"
        raise UserError(f"there is no registered model {name!r} in {store.uri}; known are: {names}.")
    if number is not None:
        if number not in known:
            raise UserError(
                f"model {name!r} has no version {number}; it has {', '.join(sorted(known, key=int))}."
            )
        return known[number]
    version = aliased(store, name, alias or CANDIDATE)
    if version is None:
        hint = f"; promote one with `soflowctl promote {shlex.quote(name)}`" if alias == CHAMPION else ""
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
