"""Resolves a name given on the command line to weights or images."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soflow_core.failures import InputError
from soflow_pipelines.shards.info import INFO_NAME
from soflow_pipelines.storage.files import atomic, sha256
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import StorageError
from soflow_pipelines.storage.opening import open_storage
from soflow_platform.errors import UserError
from soflow_platform.registry.tags import RECIPE_TAG
from soflow_platform.storage import checkpoints
from soflow_platform.storage.checkpoints import EMA, Checkpoint, CheckpointStore
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import STEP_TAG, SWEEP_TAG, TRIAL_TAG, TrackingStore
from soflow_platform.tuning.lookup import resolve
from soflow_platform.tuning.record import SweepRecord, load_record

RUN_ID = re.compile(r"[0-9a-f]{32}")
FILE_SUFFIXES = (".safetensors", ".npz")


@dataclass(frozen=True)
class EvaluationTarget:
    """The weights or the images that a name stands for, with the run or registered version they belong to."""

    name: str
    """Name in tables and tags."""
    weights: Path | None = None
    """Weights file, on a disk that all machines of the cluster share; None for a set of images."""
    images: str | None = None
    """Folder, file or URI of a set of images; None for weights."""
    step: int | None = None
    """Optimizer steps of the weights; None if unknown."""
    run: str | None = None
    """MLflow run that scores are logged to."""
    version: tuple[str, str] | None = None
    """Name and number of the registered version that scores are logged to."""
    data: str | None = None
    """Training data as the sweep named them; None if unknown."""
    sweep: SweepRecord | None = None
    """The sweep that they are of; None where the name tells of none."""
    usual_steps: int | None = None
    """`sampling.steps` of the sweep that trained the weights; None if unknown."""


@dataclass(frozen=True)
class TargetResolver:
    """Finds what a user names: a registered model (`models:/NAME@ALIAS`, `models:/NAME/VERSION`), a sweep, SWEEP/TRIAL, an MLflow run,
    a checkpoint folder or URI, a weights file, an image folder, an .npz file or a shard set.
    """

    project: ProjectFolder
    store: TrackingStore
    copies: Path
    """Folder for copies of weights that are fetched from a registry or from object storage."""
    accepts_images: bool = True
    """Whether a name may refer to images; otherwise only to weights."""

    @classmethod
    def for_scoring(cls, project: ProjectFolder, store: TrackingStore) -> TargetResolver:
        """A resolver that keeps fetched weights in the project folder, where every machine of a cluster can read them."""
        return cls(project, store, project.root / "evaluations" / "weights")

    def find(self, name: str) -> EvaluationTarget:
        """The target of this name. Raises UserError where there is none."""
        path = Path(name).expanduser()
        if name.startswith("models:/"):
            return self._registered_model(name)
        if "://" in name:
            return self._remote(name)
        if path.is_file():
            return self._file(path)
        if path.is_dir():
            if (path / EMA).is_file():
                return self._checkpoint_folder(path)
            return self._images(str(path), str(path.absolute()))
        if RUN_ID.fullmatch(name):
            return self._run(name)
        if name.startswith((".", "/", "~")) or path.suffix in FILE_SUFFIXES:
            raise UserError(f"{name}: there is no such file or folder; name {self._accepted}.")
        return self._sweep_or_model(name)

    def trial(self, record: SweepRecord, trial: str, newest: bool = False) -> EvaluationTarget:
        """A trial's best checkpoint by the metric of its sweep, or its newest one. Raises UserError where it has none."""
        store = record.checkpoints(self.project, trial)
        best = None if newest else store.best(record.metric, record.mode)
        checkpoint = best[0] if best else store.newest([EMA])[0]
        if checkpoint is None:
            raise UserError(f"trial {trial} of sweep {record.id} has no checkpoint yet.")
        return EvaluationTarget(
            f"{record.id}/{trial} at step {checkpoint.state.step}",
            weights=self._weights(checkpoint),
            step=checkpoint.state.step,
            run=checkpoint.state.run,
            data=record.experiment["data"]["source"],
            sweep=record,
            usual_steps=_usual_steps(record.recipe(trial)),
        )

    @property
    def _accepted(self) -> str:
        """The names that are understood, for an error message."""
        weights = "models:/NAME@ALIAS, a run, SWEEP/TRIAL, a checkpoint folder"
        if self.accepts_images:
            return f"{weights}, a .safetensors file, a folder of images, or an .npz file"
        return f"{weights}, or a .safetensors file"

    def _images(self, name: str, place: str) -> EvaluationTarget:
        if not self.accepts_images:
            raise UserError(f"{name} holds no weights: name {self._accepted}.")
        return EvaluationTarget(name, images=place)

    def _file(self, path: Path) -> EvaluationTarget:
        if path.suffix == ".npz":
            return self._images(str(path), str(path.absolute()))
        return EvaluationTarget(str(path), weights=path.absolute())

    def _sweep_or_model(self, name: str) -> EvaluationTarget:
        """A sweep or trial of this name; else a registered model."""
        try:
            found = resolve(self.project, name)
        except UserError as unknown:
            if "/" in name and load_record(self.project, name.partition("/")[0]) is not None:
                raise
            try:
                return self._registered_model(name)
            except UserError:
                purpose = "scored" if self.accepts_images else "sampled"
                raise UserError(
                    f"{name!r} is nothing that can be {purpose}: name {self._accepted}. As a sweep: {unknown}"
                ) from None
        trial = found.trial or (found.record.best.trial if found.record.best else None)
        if trial is None:
            raise UserError(
                f"{found} has no best trial yet: name one of its trials, as {found.record.id}/TRIAL."
            )
        return self.trial(found.record, trial)

    def _checkpoint_folder(self, path: Path) -> EvaluationTarget:
        folder = path.absolute()
        if not (folder / checkpoints.RECORD).is_file():
            return EvaluationTarget(str(path), weights=folder / EMA)
        checkpoint = checkpoints.read_record(LocalFolder(folder.parent), folder.name)
        if checkpoint is None:
            raise UserError(
                f"{path / checkpoints.RECORD} is damaged: name {path / EMA} to take what is there."
            )
        return self._checkpoint(str(path), checkpoint)

    def _checkpoint(self, name: str, checkpoint: Checkpoint) -> EvaluationTarget:
        state = checkpoint.state
        tags = self.store.run_tags(state.run)
        return EvaluationTarget(
            name,
            weights=self._weights(checkpoint),
            step=state.step,
            run=None if tags is None else state.run,
            data=(tags or {}).get("data.source"),
            usual_steps=self._recorded_steps(tags or {}),
        )

    def _remote(self, uri: str) -> EvaluationTarget:
        """A checkpoint in object storage, `s3://.../step-00000600`, or a shard set."""
        place, mark, options = uri.partition("?")
        base, _, name = place.rstrip("/").rpartition("/")
        try:
            if not name.startswith("step-") and open_storage(uri).size(INFO_NAME) is not None:
                return self._images(uri, uri)
            published = {c.name: c for c in CheckpointStore(f"{base}{mark}{options}").published()}
        except StorageError as error:
            raise UserError(f"{uri}: {error}") from error
        if name not in published:
            raise UserError(f"{uri} is no checkpoint; {base} has {', '.join(sorted(published)) or 'none'}.")
        return self._checkpoint(uri, published[name])

    def _run(self, run: str) -> EvaluationTarget:
        tags = self.store.run_tags(run)
        if tags is None:
            raise UserError(f"there is no run {run} in {self.store.uri}.")
        record = load_record(self.project, tags.get(SWEEP_TAG, ""))
        if SWEEP_TAG not in tags or record is None:
            raise UserError(
                f"run {run} belongs to no sweep under {self.project.root}: its checkpoints are elsewhere."
            )
        trial = tags.get(TRIAL_TAG) or (record.best.trial if record.best else None)
        if trial is None:
            raise UserError(
                f"run {run} is that of sweep {record.id}, which has no best trial yet: name a trial."
            )
        return self.trial(record, trial)

    def _registered_model(self, name: str) -> EvaluationTarget:
        import mlflow

        from soflow_platform.registry.versions import find_version

        require_registry(self.project, self.store)
        version = find_version(self.store, name)
        uri = f"models:/{version.name}/{version.version}"
        self.store.select()
        with tempfile.TemporaryDirectory(prefix="soflow-model-") as folder:
            fetched = Path(mlflow.artifacts.download_artifacts(uri, dst_path=folder)) / "artifacts" / EMA
            if not fetched.is_file():
                raise UserError(f"{uri} was not registered by this platform: it holds no {EMA}.")
            weights = copy_by_content(fetched, self.copies)
        tags = {**(self.store.run_tags(version.run_id) or {}), **version.tags}
        step = tags.get(STEP_TAG)
        return EvaluationTarget(
            uri,
            weights=weights,
            step=int(step) if step else None,
            run=version.run_id,
            version=(version.name, str(version.version)),
            data=tags.get("data.source"),
            usual_steps=_usual_steps(_recipe(tags)) or self._recorded_steps(tags),
        )

    def _recorded_steps(self, tags: Mapping[str, str]) -> int | None:
        """`sampling.steps` of the sweep that a run belongs to; None where its record is not here or cannot be read."""
        try:
            record = load_record(self.project, tags.get(SWEEP_TAG, ""))
        except InputError:
            return None
        return None if record is None else _usual_steps(record.recipe(tags.get(TRIAL_TAG, "")))

    def _weights(self, checkpoint: Checkpoint) -> Path:
        """The checkpoint's EMA weights, checked against their SHA-256; copied where they are in object storage."""
        try:
            with checkpoint.opened(EMA) as path:
                return (
                    path
                    if isinstance(checkpoint.storage, LocalFolder)
                    else copy_by_content(path, self.copies)
                )
        except StorageError as error:
            raise UserError(str(error)) from error


def _usual_steps(experiment: Mapping[str, Any]) -> int | None:
    """`sampling.steps` of recorded settings; None where there are none."""
    steps = (experiment.get("sampling") or {}).get("steps")
    return steps if isinstance(steps, int) else None


def _recipe(tags: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a version's trial; empty where it has none."""
    try:
        recipe = json.loads(tags.get(RECIPE_TAG) or "{}")
    except ValueError:
        return {}
    return recipe if isinstance(recipe, dict) else {}


def find_target(name: str, project: ProjectFolder, store: TrackingStore) -> EvaluationTarget:
    """The target of this name, to be scored. Raises UserError where there is none."""
    return TargetResolver.for_scoring(project, store).find(name)


def copy_by_content(path: Path, folder: Path) -> Path:
    """A copy of a weights file in `folder`, named by its SHA-256; one that is there is not written again."""
    copy = folder / f"{sha256(path)[:16]}.safetensors"
    if not copy.exists():
        with path.open("rb") as source, atomic(copy, durable=False) as target:
            shutil.copyfileobj(source, target)
    return copy


def require_registry(project: ProjectFolder, store: TrackingStore) -> None:
    """Raises UserError where the registry is that of a project folder which has no tracking store yet."""
    if not store.exists():
        raise UserError(
            f"there is no model registry under {project.root}: run a sweep first, or pass --storage or --tracking."
        )
