"""MLflow client and runs: a parent run for each sweep and a child run for each trial, found by tags after a restart.

Metrics are named `train/...`, `eval/...` and `system/...`, and their step is the optimizer step.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soflow_core.failures import printable, summarize
from soflow_pipelines.storage.files import move_if_absent, short_digest, temporary_folder
from soflow_platform.config.locations import require_no_secret
from soflow_platform.errors import UserError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.outages import describe_outage, sqlite_reason

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SWEEP_TAG = "soflow.sweep"
TRIAL_TAG = "soflow.trial"
STEP_TAG = "soflow.step"
PARENT_TAG = "mlflow.parentRunId"
FLAGS_TAG = "eval.flags"
"""Tag with the flags of a run's metrics: sentences on why a value is refused or not comparable with others."""
FAILURE_TAG = "failure"
"""Tag with the sentence on why a trial failed."""
FAILURE_ARTIFACT = "failure.txt"
"""Artifact with the traceback of the trial's last failure."""
VIEW_TAG = "mlflow.sharedViewState."
"""Beginning of the tags of an experiment in which MLflow's page looks for its state; the rest is the key in the page's URL."""
TAG_LIMIT = 5000
"""Most characters in a tag's value, a limit of MLflow."""
PARAM_LIMIT = 100
"""Largest number of params in one request, a limit of MLflow."""


SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
"""Of the tracking URIs that MLflow keeps runs and models with."""


class TrackingStore:
    """An MLflow tracking store with its model registry. All MLflow clients are created by this class.

    MLflow is imported, and the database of an embedded store created, when `client` is first used.

    Raises UserError for a URI that holds a secret.
    """

    def __init__(self, uri: str) -> None:
        try:
            require_no_secret(uri)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        self.uri = uri

    def __reduce__(self) -> tuple[Any, ...]:
        return TrackingStore, (self.uri,)

    @functools.cached_property
    def client(self) -> MlflowClient:
        """The MLflow client, with telemetry and progress bars off."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        # storage.retry repeats requests and logs that it does; MLflow's own retries would be silent for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._require_known_scheme()
        try:
            return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        except ValueError as error:
            raise UserError(
                f"the tracking URI {printable(self.uri)!r} is none: {summarize(error)}."
            ) from None
        except ModuleNotFoundError as error:
            raise UserError(
                f"the tracking store {self.uri} needs the Python package {error.name}: install it beside soflow."
            ) from None

    def _require_known_scheme(self) -> None:
        """Raises UserError for a URI that MLflow opens no runs and models with; it no longer does so in plain folders."""
        scheme = self.uri.partition(":")[0].partition("+")[0].lower() if ":" in self.uri else ""
        folders = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() == "true"
        if scheme not in (*SCHEMES, *(("", "file") if folders else ())):
            raise UserError(
                f"the tracking URI {printable(self.uri)!r} is of no server and of no database: name http://HOST:PORT, "
                "sqlite:///FILE or postgresql://HOST/NAME."
            )

    def select(self) -> None:
        """Make this store the one of MLflow's global functions, whatever MLFLOW_TRACKING_URI and MLFLOW_REGISTRY_URI say."""
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)

    @property
    def database(self) -> Path | None:
        """The SQLite file of an embedded store; None for a server."""
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:///") else None

    def exists(self) -> bool:
        """Whether the store is a server or an embedded store whose database was created."""
        return self.database is None or self.database.is_file()

    def prepare(self) -> None:
        """Create the store, before several processes open it together.

        Raises UserError where no tracking server answers, or where the database of an embedded store cannot be used.
        """
        if self.database is not None:
            if not self.database.exists():
                _create(self.database)
            self._open(self.database)
            return
        try:
            self.client.search_experiments(max_results=1)
        except UserError:
            raise
        except Exception as error:
            raise UserError(self._refusal(error)) from None

    def _refusal(self, error: Exception) -> str:
        """A sentence on why the server did not do as it was asked."""
        status = getattr(error, "get_http_status_code", lambda: None)()
        if status == 401:
            return (
                f"the tracking server {self.uri} refuses the user or the password: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), on every node."
            )
        if status == 403:
            return (
                f"the tracking server {self.uri} answers and forbids it ({summarize(error)[:200]}): give this user the permission, "
                "and start the server with this host among its --allowed-hosts."
            )
        return f"the tracking server {self.uri} does not answer: {summarize(error)[:200]}"

    def _open(self, path: Path) -> None:
        try:
            self.client.search_experiments(max_results=1)
            with contextlib.closing(sqlite3.connect(path)) as database:
                # Write-ahead logging lets readers and writers work at once; the setting stays in the file.
                database.execute("pragma journal_mode=WAL")
        except Exception as error:
            if describe_outage(error) is not None or isinstance(error, UserError):
                raise
            reason = sqlite_reason(error) or summarize(error)[:200]
            raise UserError(
                f"the tracking database {path} cannot be used ({reason}): put a copy of it in its place, or, if it holds no "
                "runs, move it away."
            ) from None

    def run_tags(self, run: str | None) -> dict[str, str] | None:
        """The tags of a run; None where there is no such run."""
        from mlflow.exceptions import MlflowException

        if not run or not self.exists():
            return None
        try:
            return dict(self.client.get_run(run).data.tags)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def _create(path: Path) -> None:
    """Create the database of an embedded store: whole or not at all, for MLflow cannot complete one whose creation was cut."""
    with temporary_folder(path) as folder:
        new = folder / path.name
        TrackingStore(f"sqlite:///{new}").client.search_experiments(max_results=1)
        # Another command may have created it meanwhile.
        move_if_absent(new, path)


@dataclass(frozen=True)
class TrackedDataset:
    """Name, digest and source of the training data, as an input of an MLflow run."""

    name: str
    digest: str
    source: str

    def as_input(self) -> Any:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow keeps 36 characters of a digest.
        digest = short_digest(self.digest, 32)
        source = json.dumps({"uri": self.source})
        dataset = Dataset(name=self.name, digest=digest, source_type="http", source=source)
        return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")])


def tracked_dataset(tags: Mapping[str, str]) -> TrackedDataset:
    """The training data that the tags of a run name."""
    return TrackedDataset(tags["data.source"], tags["data.digest"], tags["data.source"])


@dataclass
class Tracking:
    """One experiment of a tracking store, with the runs of sweeps and of their trials."""

    store: TrackingStore
    experiment_id: str

    @classmethod
    def open(cls, uri: str, experiment: str, project: ProjectFolder) -> Tracking:
        """Open or create the store and the experiment; an embedded store keeps its artifacts in the project folder.

        Raises UserError where no tracking server answers, or where the experiment was deleted.
        """
        store = TrackingStore(uri)
        store.prepare()
        from mlflow.exceptions import MlflowException

        existing = store.client.get_experiment_by_name(experiment)
        if existing is None:
            location = project.artifacts.as_uri() if store.database is not None else None
            try:
                return cls(store, store.client.create_experiment(experiment, artifact_location=location))
            except MlflowException:
                existing = store.client.get_experiment_by_name(experiment)
                if existing is None:
                    raise
                # Another command has created it meanwhile.
        if existing.lifecycle_stage != "active":
            raise UserError(
                f"the MLflow experiment {experiment!r} was deleted: restore it, or set tracking.experiment to another."
            )
        return cls(store, existing.experiment_id)

    @property
    def client(self) -> MlflowClient:
        return self.store.client

    def find(self, sweep: str, trial: str | None = None) -> Run | None:
        """The run of a sweep, or of one of its trials, if there is one."""
        condition = f"tags.`{SWEEP_TAG}` = '{sweep}'"
        condition += f" and tags.`{TRIAL_TAG}` = '{trial}'" if trial else f" and tags.`{TRIAL_TAG}` IS NULL"
        runs = self.client.search_runs([self.experiment_id], condition, max_results=1)
        return runs[0] if runs else None

    def children(self, parent: str) -> list[Run]:
        """The trial runs of a sweep's run."""
        return list(self.client.search_runs([self.experiment_id], f"tags.`{PARENT_TAG}` = '{parent}'"))

    def open_run(
        self,
        sweep: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        trial: str | None = None,
        parent: str | None = None,
        dataset: TrackedDataset | None = None,
    ) -> str:
        """Find or create a run, set its status to RUNNING, write what it lacks of `params` and `dataset`, and return its id."""
        from mlflow.entities import Param

        client = self.client
        existing = self.find(sweep, trial)
        if existing is None:
            identity = {
                SWEEP_TAG: sweep,
                **({TRIAL_TAG: trial} if trial else {}),
                **({PARENT_TAG: parent} if parent else {}),
            }
            run = client.create_run(self.experiment_id, tags={**identity, **tags}, run_name=name).info.run_id
        else:
            run = existing.info.run_id
            client.update_run(run, status="RUNNING")
            if FAILURE_TAG in existing.data.tags:
                client.delete_tag(run, FAILURE_TAG)
        # A run that is there lacks some where its creation was cut: the command was killed, or the server went away.
        known = {} if existing is None else existing.data.params
        items = [Param(key, str(value)) for key, value in params.items() if key not in known]
        for start in range(0, len(items), PARAM_LIMIT):
            client.log_batch(run, params=items[start : start + PARAM_LIMIT])
        inputs = None if existing is None else existing.inputs
        if dataset is not None and not (inputs and inputs.dataset_inputs):
            client.log_inputs(run, datasets=[dataset.as_input()])
        return str(run)

    def share_view(self, key: str, state: str) -> None:
        """Keep a state of MLflow's page with the experiment, for links that name it by its key."""
        self.client.set_experiment_tag(self.experiment_id, f"{VIEW_TAG}{key}", state)

    def log_failure(self, run: str, sentence: str, traceback: str) -> None:
        """Keep with a run why it failed: a tag, and the whole traceback as an artifact."""
        self.client.set_tag(run, FAILURE_TAG, sentence[:TAG_LIMIT])
        self.client.log_text(run, traceback, FAILURE_ARTIFACT)

    def finish(self, run: str, status: str) -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run, status)

    def log_result(self, run: str, best: Mapping[str, Any]) -> None:
        """Log the result of a sweep on its run: the best trial, its metrics, its registered version."""
        from mlflow.entities import Metric

        client = self.client
        for key in ("trial", "step", "model", "version"):
            if key in best:
                client.set_tag(run, f"best.{key}", str(best[key]))
        now = int(time.time() * 1000)
        logged = client.get_run(run).data.metrics
        values = []
        for key, value in best["metrics"].items():
            if key in logged and repr(logged[key]) == repr(float(value)):
                continue
            # A run shows what was logged last of its largest step, which may be that of the trial that was the best before.
            steps = [each.step for each in client.get_metric_history(run, key)] if key in logged else []
            values.append(Metric(key, float(value), now, max([best["step"], *steps])))
        client.log_batch(run, metrics=values)
