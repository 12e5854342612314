"""Runs in MLflow: one parent for a sweep, a child for each trial, found again after any restart.

Metrics are named `train/...`, `eval/...` and `system/...`, and their step is the optimizer step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soflow_platform.errors import UserError
from soflow_platform.storage.project import ProjectFolder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SWEEP_TAG = "soflow.sweep"
TRIAL_TAG = "soflow.trial"
STEP_TAG = "soflow.step"
PARENT_TAG = "mlflow.parentRunId"
FLAGS_TAG = "eval.flags"
"""What has to be said of a run's numbers, in sentences."""
PARAM_LIMIT = 100
"""Params in one MLflow batch."""


def client_for(uri: str) -> MlflowClient:
    """A client that sends no telemetry and keeps its own chatter out of the terminal."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # A server that is away is waited for by `retry`, which says so; MLflow's own attempts would be silent for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def prepare_store(uri: str) -> None:
    """Create or migrate the tracking store, once, before several processes open it together.

    Raises UserError where no tracking server answers.
    """
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        client_for(uri).search_experiments(max_results=1)
        with contextlib.closing(sqlite3.connect(path)) as database:
            # Readers and several writers at once; the setting stays in the file.
            database.execute("pragma journal_mode=WAL")
        return
    try:
        client_for(uri).search_experiments(max_results=1)
    except Exception as error:
        first = str(error).strip().splitlines()[0][:200]
        raise UserError(f"the tracking server {uri} does not answer: {first}") from None


@dataclass(frozen=True)
class TrackedDataset:
    """The training data as a run's page shows it."""

    name: str
    digest: str
    source: str

    def as_input(self) -> Any:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow keeps 36 characters of a digest.
        digest = self.digest.rsplit(":", 1)[-1][:32]
        source = json.dumps({"uri": self.source})
        kept = Dataset(name=self.name, digest=digest, source_type="http", source=source)
        return DatasetInput(kept, tags=[InputTag("mlflow.data.context", "training")])


def tracked_dataset(tags: Mapping[str, str]) -> TrackedDataset:
    """The data set that a run's tags name."""
    return TrackedDataset(tags["data.source"], tags["data.digest"], tags["data.source"])


@dataclass
class Tracking:
    """One experiment of one tracking store."""

    uri: str
    experiment: str
    experiment_id: str

    @classmethod
    def open(cls, uri: str, experiment: str, storage: ProjectFolder) -> Tracking:
        """Open or create the experiment; an embedded store keeps its artifacts under the project folder."""
        client = client_for(uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None and found.lifecycle_stage != "active":
            raise UserError(
                f"the MLflow experiment {experiment!r} was deleted: restore it, or set tracking.experiment to another."
            )
        if found is not None:
            return cls(uri, experiment, found.experiment_id)
        location = storage.artifacts.as_uri() if uri.startswith("sqlite:") else None
        return cls(uri, experiment, client.create_experiment(experiment, artifact_location=location))

    @property
    def client(self) -> MlflowClient:
        return client_for(self.uri)

    def find(self, sweep: str, trial: str | None = None) -> Run | None:
        """The run of a sweep, or of one of its trials, if there is one."""
        wanted = f"tags.`{SWEEP_TAG}` = '{sweep}'"
        wanted += f" and tags.`{TRIAL_TAG}` = '{trial}'" if trial else f" and tags.`{TRIAL_TAG}` IS NULL"
        runs = self.client.search_runs([self.experiment_id], wanted, max_results=1)
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
        """Find or create a run, set it running, and return its id. Params are written once, at its creation."""
        from mlflow.entities import Param

        client = self.client
        found = self.find(sweep, trial)
        if found is not None:
            run = found.info.run_id
            client.update_run(run, status="RUNNING")
            return str(run)
        own = {
            SWEEP_TAG: sweep,
            **({TRIAL_TAG: trial} if trial else {}),
            **({PARENT_TAG: parent} if parent else {}),
        }
        run = client.create_run(self.experiment_id, tags={**own, **tags}, run_name=name).info.run_id
        items = [Param(key, str(value)) for key, value in params.items()]
        for start in range(0, len(items), PARAM_LIMIT):
            client.log_batch(run, params=items[start : start + PARAM_LIMIT])
        if dataset is not None:
            client.log_inputs(run, datasets=[dataset.as_input()])
        return str(run)

    def finish(self, run: str, status: str) -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run, status)

    def log_result(self, run: str, best: Mapping[str, Any]) -> None:
        """What a sweep came to, on its own run: the best trial, its numbers, its registered version."""
        from mlflow.entities import Metric

        client = self.client
        for key in ("trial", "step", "model", "version"):
            if key in best:
                client.set_tag(run, f"best.{key}", str(best[key]))
        now = int(time.time() * 1000)
        values = [Metric(key, float(value), now, best["step"]) for key, value in best["metrics"].items()]
        known = client.get_run(run).data.metrics
        client.log_batch(run, metrics=[m for m in values if m.key not in known])

    def link(self, parent: str, metric: str, address: str = "http://127.0.0.1:5000") -> str:
        """The page with the trials of one sweep, best first, their curves laid over each other."""
        query = urllib.parse.urlencode(
            {
                "searchFilter": f"tags.`{PARENT_TAG}` = '{parent}'",
                "orderByKey": f"metrics.`{metric}`",
                "orderByAsc": "true",
                "workflowType": "machine_learning",
                "compareRunsMode": "CHART",
            }
        )
        return f"{address}/#/experiments/{self.experiment_id}/runs?{query}"
