"""What a user names to have it scored: a registered model, a run, a checkpoint, weights, a folder of images, an .npz file."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soflow_pipelines.storage.files import sha256
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import StorageError
from soflow_platform.errors import UserError
from soflow_platform.storage import checkpoints
from soflow_platform.storage.checkpoints import EMA, Checkpoint, CheckpointStore
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import STEP_TAG, SWEEP_TAG, TRIAL_TAG, client_for
from soflow_platform.tuning.lookup import resolve
from soflow_platform.tuning.record import SweepRecord, load_record

RUN_ID = re.compile(r"[0-9a-f]{32}")
NAMED = "models:/NAME@ALIAS, a run, SWEEP/TRIAL, a checkpoint folder, a .safetensors file, a folder of images, or an .npz file"


@dataclass(frozen=True)
class EvaluationTarget:
    """Something whose images can be scored."""

    name: str
    """What tags and tables call it."""
    weights: Path | None = None
    """A file that the machines of the cluster see; None where the images are there already."""
    images: str | None = None
    """Where they are."""
    step: int | None = None
    """Optimizer steps of the weights, where known."""
    run: str | None = None
    """The MLflow run that the numbers belong to."""
    version: tuple[str, str] | None = None
    """Name and number of the registered version that the numbers belong to."""
    data: str | None = None
    """The data it was trained on, as the sweep named it; None where nobody wrote it down."""


def find_target(name: str, storage: ProjectFolder, tracking_uri: str) -> EvaluationTarget:
    """What `name` stands for. Raises UserError where it stands for nothing that can be scored."""
    path = Path(name).expanduser()
    if name.startswith("models:/"):
        return _model(name, storage, tracking_uri)
    if "://" in name:
        return _remote_checkpoint(name, storage, tracking_uri)
    if path.is_file():
        return _file(path)
    if path.is_dir():
        if (path / EMA).is_file():
            return _checkpoint_folder(path, storage, tracking_uri)
        return EvaluationTarget(str(path), images=str(path.absolute()))
    if RUN_ID.fullmatch(name):
        return _run(name, storage, tracking_uri)
    if name.startswith((".", "/", "~")):
        raise UserError(f"{name}: there is no such file or folder; name {NAMED}.")
    return _sweep_or_model(name, storage, tracking_uri)


def _file(path: Path) -> EvaluationTarget:
    if path.suffix == ".npz":
        return EvaluationTarget(str(path), images=str(path.absolute()))
    return EvaluationTarget(str(path), weights=path.absolute())


def _sweep_or_model(name: str, storage: ProjectFolder, tracking_uri: str) -> EvaluationTarget:
    """A sweep or trial by name; else a registered model."""
    try:
        found = resolve(storage, name)
    except UserError as unknown:
        if "/" in name and load_record(storage, name.partition("/")[0]) is not None:
            raise
        try:
            return _model(name, storage, tracking_uri)
        except UserError:
            raise UserError(
                f"{name!r} is nothing that can be scored: name {NAMED}. As a sweep: {unknown}"
            ) from None
    trial = found.trial or (found.record.best or {}).get("trial")
    if trial is None:
        raise UserError(f"{found} has no best trial yet: name one of its trials, as {found.record.id}/TRIAL.")
    return trial_target(storage, found.record, trial)


def trial_target(
    storage: ProjectFolder, record: SweepRecord, trial: str, newest: bool = False
) -> EvaluationTarget:
    """A trial's best checkpoint by the sweep's metric, or its newest one."""
    root = checkpoints.trial_root(record.experiment["training"].get("checkpoints"), storage, record.id, trial)
    best = None if newest else CheckpointStore(root).best(record.metric, record.mode)
    chosen = best[0] if best else CheckpointStore(root).newest([EMA])[0]
    if chosen is None:
        raise UserError(f"trial {trial} of sweep {record.id} has no checkpoint yet.")
    return EvaluationTarget(
        f"{record.id}/{trial} at step {chosen.position.step}",
        weights=_weights_of(chosen, storage),
        step=chosen.position.step,
        run=chosen.position.run,
        data=record.experiment["data"]["source"],
    )


def _weights_of(checkpoint: Checkpoint, storage: ProjectFolder) -> Path:
    """Its averaged weights, compared with what was written. Raises UserError where they are damaged or away."""
    try:
        with checkpoint.opened(EMA) as path:
            return path if isinstance(checkpoint.storage, LocalFolder) else kept_weights(path, storage)
    except StorageError as error:
        raise UserError(str(error)) from error


def kept_weights(path: Path, storage: ProjectFolder) -> Path:
    """A copy in the project folder, by content, which every machine of a cluster sees and no temporary folder takes away."""
    kept = storage.root / "evaluations" / "weights" / f"{sha256(path)[:16]}.safetensors"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        aside = kept.with_name(f".{kept.name}.{os.getpid()}")
        shutil.copyfile(path, aside)
        aside.replace(kept)
    return kept


def _checkpoint_folder(path: Path, storage: ProjectFolder, tracking_uri: str) -> EvaluationTarget:
    folder = path.absolute()
    if not (folder / checkpoints.RECORD).is_file():
        return EvaluationTarget(str(path), weights=folder / EMA)
    checkpoint = checkpoints.read_record(LocalFolder(folder.parent), folder.name)
    if checkpoint is None:
        raise UserError(f"{path / checkpoints.RECORD} is damaged: name {path / EMA} to score what is there.")
    return _checkpoint(str(path), checkpoint, storage, tracking_uri)


def _checkpoint(
    name: str, checkpoint: Checkpoint, storage: ProjectFolder, tracking_uri: str
) -> EvaluationTarget:
    position = checkpoint.position
    tags = _tags(tracking_uri, position.run)
    return EvaluationTarget(
        name,
        weights=_weights_of(checkpoint, storage),
        step=position.step,
        run=None if tags is None else position.run,
        data=(tags or {}).get("data.source"),
    )


def _remote_checkpoint(uri: str, storage: ProjectFolder, tracking_uri: str) -> EvaluationTarget:
    """`s3://.../step-00000600`: a checkpoint that lies elsewhere."""
    place, mark, options = uri.partition("?")
    base, _, name = place.rstrip("/").rpartition("/")
    try:
        found = {c.name: c for c in CheckpointStore(f"{base}{mark}{options}").published()}
        if name not in found:
            raise UserError(f"{uri} is no checkpoint; {base} has {', '.join(sorted(found)) or 'none'}.")
    except StorageError as error:
        raise UserError(f"{uri}: {error}") from error
    return _checkpoint(uri, found[name], storage, tracking_uri)


def _run(run: str, storage: ProjectFolder, tracking_uri: str) -> EvaluationTarget:
    tags = _tags(tracking_uri, run)
    if tags is None:
        raise UserError(f"there is no run {run} in {tracking_uri}.")
    record = load_record(storage, tags.get(SWEEP_TAG, ""))
    if SWEEP_TAG not in tags or record is None:
        raise UserError(f"run {run} belongs to no sweep under {storage.root}: its checkpoints are elsewhere.")
    trial = tags.get(TRIAL_TAG) or (record.best or {}).get("trial")
    if trial is None:
        raise UserError(f"run {run} is that of sweep {record.id}, which has no best trial yet: name a trial.")
    return trial_target(storage, record, trial)


def _model(name: str, storage: ProjectFolder, tracking_uri: str) -> EvaluationTarget:
    import mlflow

    from soflow_platform.registry.versions import find_version

    _require_store(tracking_uri, storage)
    version = find_version(tracking_uri, name)
    mlflow.set_tracking_uri(tracking_uri)
    uri = f"models:/{version.name}/{version.version}"
    with tempfile.TemporaryDirectory(prefix="soflow-model-") as folder:
        fetched = Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder)) / "artifacts" / EMA
        if not fetched.is_file():
            raise UserError(f"{uri} was not registered by this platform: it holds no {EMA}.")
        weights = kept_weights(fetched, storage)
    tags = {**(_tags(tracking_uri, version.run_id) or {}), **version.tags}
    step = tags.get(STEP_TAG)
    return EvaluationTarget(
        uri,
        weights=weights,
        step=int(step) if step else None,
        run=version.run_id,
        version=(version.name, str(version.version)),
        data=tags.get("data.source"),
    )


def _require_store(tracking_uri: str, storage: ProjectFolder) -> None:
    if tracking_uri == storage.tracking_uri and not (storage.root / "mlflow.db").is_file():
        raise UserError(
            f"there is no model registry under {storage.root}: run a sweep first, or pass --storage or --tracking."
        )


def _tags(tracking_uri: str, run: str | None) -> dict[str, Any] | None:
    """The tags of a run; None where there is no such run."""
    from mlflow.exceptions import MlflowException

    path = Path(tracking_uri.removeprefix("sqlite:///"))
    if not run or (tracking_uri.startswith("sqlite:///") and not path.is_file()):
        return None
    try:
        return dict(client_for(tracking_uri).get_run(run).data.tags)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
