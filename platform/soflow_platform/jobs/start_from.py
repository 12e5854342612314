"""Finds the weights that trials start from, and keeps a copy of each in the project folder.

A sweep that goes on starts the trials that are left from the same weights, also where an alias has moved meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soflow_core.failures import InputError
from soflow_core.initial_weights import read_checkpoint
from soflow_core.networks import Architecture
from soflow_core.weights import Weights, load_weights, read_header, save_weights
from soflow_pipelines.preparation.builtin import Expected
from soflow_pipelines.storage.files import sha256
from soflow_pipelines.storage.local import LocalFolder
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.locations import is_file_name
from soflow_platform.errors import UserError
from soflow_platform.jobs.targets import EvaluationTarget, TargetResolver, copy_by_content
from soflow_platform.storage import checkpoints
from soflow_platform.storage.checkpoints import EMA, STATE, Checkpoint
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore
from soflow_platform.training.model import describe_network
from soflow_platform.training.start import LINEAGE_TAG, LONGEST_LINEAGE, SETTING, Start, start_key
from soflow_platform.training.state_files import opened_state
from soflow_platform.tuning.lookup import resolve

FOLDER = "starts"
"""Folder of the copies, in the project folder."""


def resolve_starts(
    trials: Iterable[tuple[str, Experiment]],
    data: Expected,
    project: ProjectFolder,
    tracking_uri: str,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Start]:
    """The start of each trial, by name, that has one. `known` are those that an earlier start of the sweep found, by `start_key`.

    Raises UserError where there are no such weights, or where a trial's network cannot take them.
    """
    found = {key: Start(**content) for key, content in (known or {}).items()}
    finder = _Finder(project, TrackingStore(tracking_uri))
    starts = {}
    for name, experiment in trials:
        key = start_key(experiment)
        if not key:
            continue
        config = describe_network(experiment, data)
        try:
            if key not in found or not Path(found[key].weights).is_file():
                found[key] = _same(finder.find(experiment, config), found.get(key))
            found[key].notes(experiment, config)
        except InputError as error:
            raise UserError(f"trial {name}: {SETTING}: {str(error).rstrip('.')}.") from None
        starts[name] = found[key]
    return starts


def _same(start: Start, known: Start | None) -> Start:
    """A start that was found again, because its copy is gone. Raises UserError where it is no longer that of the sweep."""
    if known is not None and start.lineage[0].get("digest") != known.lineage[0].get("digest"):
        raise UserError(
            f"the sweep started from weights of which {known.weights} was the copy; it is gone, and {start.lineage[0]['from']} has "
            "others: put it back, or pass --again"
        )
    return start


@dataclass(frozen=True)
class _Finder:
    project: ProjectFolder
    store: TrackingStore

    @property
    def folder(self) -> Path:
        return self.project.root / FOLDER

    def find(self, experiment: Experiment, config: Architecture) -> Start:
        """The weights that a trial starts from, copied."""
        training = experiment.training
        name, which = str(training.start_from), training.start_weights
        path = Path(name)
        if is_file_name(name) and not path.exists():
            raise UserError(f"there is no file or folder {name}.")
        if path.is_file() and path.suffix != ".safetensors":
            weights = read_checkpoint(path, config, which, training.start_layout)
            return self._converted(EvaluationTarget(name, weights=path), weights, which)
        if training.start_layout is not None:
            raise UserError(
                f"training.start_layout is for checkpoints in torch's own format, and {name} is none: leave it out"
            )
        if which == "raw":
            return self._raw(name)
        target = TargetResolver(self.project, self.store, self.folder, accepts_images=False).find(name)
        assert target.weights is not None, "a resolver without images finds weights"
        # The whole file is read once, so that damage shows before anything starts.
        weights = load_weights(target.weights)
        return self._start(
            target, copy_by_content(target.weights, self.folder), sha256(target.weights), weights, which
        )

    def _raw(self, name: str) -> Start:
        checkpoint = self._checkpoint(name)
        with checkpoint.opened(EMA) as path:
            header, _ = read_header(path)
        with checkpoint.opened(STATE) as path, opened_state(checkpoint) as state:
            weights = Weights(header.network_config, header.objective, header.data, dict(state["network"]))
            target = EvaluationTarget(
                f"{name} at step {checkpoint.state.step}",
                weights=path,
                step=checkpoint.state.step,
                run=checkpoint.state.run,
            )
            return self._converted(target, weights, "raw", checkpoint.digest_of(STATE))

    def _checkpoint(self, name: str) -> Checkpoint:
        """A trial's best checkpoint with a whole state, or its newest; or that of a folder."""
        path = Path(name)
        if path.is_dir() and (path / checkpoints.RECORD).is_file():
            found = checkpoints.read_record(LocalFolder(path.parent), path.name)
        elif is_file_name(name) or ":/" in name:
            raise UserError(
                f"{name} holds averaged weights alone: name SWEEP/TRIAL or a checkpoint folder, or set training.start_weights to ema"
            )
        else:
            ref = resolve(self.project, name)
            trial = ref.trial or (ref.record.best.trial if ref.record.best else None)
            if trial is None:
                raise UserError(
                    f"{ref} has no best trial yet: name one of its trials, as {ref.record.id}/TRIAL"
                )
            trial_store = ref.record.checkpoints(self.project, trial)
            best = trial_store.best(ref.record.metric, ref.record.mode)
            found = best[0] if best else trial_store.newest([EMA, STATE])[0]
        if found is None:
            raise UserError(f"{name} has no checkpoint yet, or its record is damaged")
        return found

    def _converted(
        self, target: EvaluationTarget, weights: Weights, which: str, digest: str | None = None
    ) -> Start:
        """A start whose weights are written as a file of their own; `digest` is by default that of the file that they are from."""
        assert target.weights is not None
        assert weights.objective is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=self.folder) as scratch:
            written = Path(scratch) / EMA
            save_weights(written, weights.tensors, weights.network_config, weights.objective, weights.data)
            copy = copy_by_content(written, self.folder)
        return self._start(target, copy, digest or sha256(target.weights), weights, which)

    def _start(
        self, target: EvaluationTarget, copy: Path, digest: str, weights: Weights, which: str
    ) -> Start:
        entry = {
            "from": target.name,
            "digest": digest,
            "weights": which,
            "method": None if weights.objective is None else weights.objective.method,
            "step": target.step,
            "run": target.run,
            "version": "/".join(target.version) if target.version else None,
        }
        own = {key: value for key, value in entry.items() if value is not None}
        return Start(str(copy), [own, *self._before(target)][:LONGEST_LINEAGE])

    def _before(self, target: EvaluationTarget) -> list[dict[str, Any]]:
        """What the weights themselves were started from, as far as their run says."""
        if target.run is None or not self.store.exists():
            return []
        text = (self.store.run_tags(target.run) or {}).get(LINEAGE_TAG)
        with contextlib.suppress(ValueError):
            lineage = json.loads(text or "[]")
            if isinstance(lineage, list):
                return [entry for entry in lineage if isinstance(entry, dict)]
        return []
