"""The weights that a trial starts from (`training.start_from`), and their lineage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soflow_core.failures import InputError
from soflow_core.initial_weights import fit, start_from
from soflow_core.networks import Architecture, NetworkModule
from soflow_core.weights import load_weights, read_header
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.locations import is_file_name
from soflow_platform.errors import JobError, UserError

SETTING = "training.start_from"
LINEAGE_TAG = "start.lineage"
LONGEST_LINEAGE = 8


@dataclass(frozen=True)
class Start:
    """Weights that a trial starts from, and what they come from."""

    weights: str
    """Weights file, in the project folder."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """One entry for these weights (`from`, `digest`, `weights`, `method`, `step`, `run`, `version`), and one for each that they
    themselves were started from, the newest first."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def notes(self, experiment: Experiment, config: Architecture) -> tuple[str, ...]:
        """What the network does not take over as it is. Raises InputError where the weights do not fit it."""
        return fit(read_header(self.weights)[0], config, experiment.objective.method).notes

    def apply(self, network: NetworkModule, method: str) -> None:
        """Give the network these weights. Raises JobError where the file is no longer there."""
        if not Path(self.weights).is_file():
            raise JobError(
                f"{self.weights}, a copy of the weights that this trial starts from ({SETTING}), is gone: put it back, or train this "
                "as another sweep."
            )
        start_from(network, load_weights(self.weights), method)

    def tags(self) -> dict[str, str]:
        """Tags of the trial's run."""
        return {"start.from": describe_lineage(self.lineage), LINEAGE_TAG: json.dumps(self.lineage)}


def start_key(experiment: Experiment) -> str:
    """The settings of where a trial starts, as one text; empty where it starts from fresh weights."""
    training = experiment.training
    if training.start_from is None:
        return ""
    return " ".join(filter(None, (training.start_from, training.start_weights, training.start_layout)))


def start_of(experiment: Experiment, known: Mapping[str, Any]) -> Start | None:
    """Where a trial starts, of those that were found for its sweep, by `start_key`; None for fresh weights.

    Raises JobError where it is none of them.
    """
    key = start_key(experiment)
    if not key:
        return None
    if key not in known:
        raise JobError(
            f"{SETTING} {experiment.training.start_from} was not found when the sweep was started: start it again."
        )
    return Start(**known[key])


def describe_lineage(lineage: list[dict[str, Any]]) -> str:
    """`models:/digits/3 (flow_matching, 600 steps, ema), which started from ...`."""
    parts = []
    for entry in lineage:
        steps = [f"{entry['step']:,} steps"] if entry.get("step") is not None else []
        facts = [str(entry.get("method") or "unknown method"), *steps, str(entry.get("weights", "ema"))]
        parts.append(f"{entry.get('from', '?')} ({', '.join(facts)})")
    return ", which started from ".join(parts)


def check_start_file(experiment: Experiment, config: Architecture | None) -> None:
    """Raises UserError where a trial starts from a file that is not there, or from weights that do not fit its network.

    Names of models and sweeps, and checkpoints that take long to read, are not looked at.
    """
    name = experiment.training.start_from
    if name is None or not is_file_name(name):
        return
    path = Path(name)
    if not path.exists():
        raise UserError(f"{SETTING}: there is no file or folder {path}.")
    if path.suffix == ".safetensors":
        try:
            header, _ = read_header(path)
            if config is not None:
                fit(header, config, experiment.objective.method)
        except InputError as error:
            raise UserError(f"{SETTING}: {str(error).rstrip('.')}.") from None
