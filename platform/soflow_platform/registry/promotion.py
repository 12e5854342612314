"""The champion alias: moved by one command at a time, with the decision kept on the version, and moved back."""

from __future__ import annotations

import contextlib
import getpass
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from soflow_platform.errors import JobError, UserError
from soflow_platform.registry.card import with_decision
from soflow_platform.registry.stored_scores import NotComparableError, stored_scores
from soflow_platform.registry.tags import DECISION_PREFIX
from soflow_platform.registry.versions import CHAMPION, aliased, versions_of
from soflow_platform.storage.locks import locked
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.environment import git_commit
from soflow_platform.tracking.store import TrackingStore

PREVIOUS = "soflow.previous_champion"
PROMOTED = "soflow.promoted"
HISTORY = "soflow.champions"
"""Tag of a registered model: the champions before this one, oldest first."""
LOCK_SECONDS = 30
"""How long a command waits for another one that moves the alias, which takes a second."""

Kind = Literal["promoted", "refused", "forced", "restored"]


@dataclass(frozen=True)
class Decision:
    """What was decided about a version, and why."""

    kind: Kind
    reason: str
    against: str | None
    """Version of the champion it was compared with; None where there was none."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Protocol and scores, as JSON values."""


@dataclass(frozen=True)
class Promotion:
    """A change of champion: from which version, to which, and why."""

    model: str
    version: str
    previous: str | None
    reason: str


@dataclass(frozen=True)
class Champions:
    """The champions of one registered model."""

    store: TrackingStore
    project: ProjectFolder
    name: str

    def present(self) -> str | None:
        """Version of the champion; None where there is none."""
        champion = aliased(self.store, self.name, CHAMPION)
        return None if champion is None else str(champion.version)

    def move(self, version: str, decision: Decision) -> Promotion:
        """Make a version champion in place of `decision.against`, and keep the decision on it.

        Raises JobError where another version became champion meanwhile, UserError where the version is gone.
        """
        with self._alone():
            present = self.present()
            if present != decision.against:
                raise JobError(
                    f"version {version} of {self.name!r} was compared with {_named(decision.against)}, and meanwhile another command "
                    f"made {_named(present)}: nothing was changed; the same command compares with the champion of now."
                )
            history = self._history()
            client = self.store.client
            client.set_model_version_tag(self.name, version, PREVIOUS, present or "")
            self.record(version, decision)
            if present is not None:
                self._keep_history([*history, present])
            client.set_registered_model_alias(self.name, CHAMPION, version)
        return Promotion(self.name, version, present, decision.reason)

    def rollback(self) -> Promotion:
        """Make the champion before the present one champion again. Raises UserError where there was none, or it was deleted."""
        with self._alone():
            present = self.present()
            if present is None:
                raise UserError(f"model {self.name!r} has no champion: there is none before it.")
            history = self._history()
            while history and history[-1] == present:
                history.pop()
            if not history:
                raise UserError(
                    f"version {present} of {self.name!r} is the first champion: there is none before it."
                )
            previous = history.pop()
            if previous not in {str(v.version) for v in versions_of(self.store, self.name)}:
                raise UserError(
                    f"version {previous} of {self.name!r}, the champion before version {present}, was deleted: promote another one."
                )
            reason = f"rollback from version {present}"
            self.record(previous, Decision("restored", reason, present))
            self._keep_history(history)
            self.store.client.set_registered_model_alias(self.name, CHAMPION, previous)
        return Promotion(self.name, previous, present, reason)

    def record(self, version: str, decision: Decision) -> None:
        """Keep a decision as tags of the version and as a line of its description."""
        client = self.store.client
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        who = f"{_user()}@{socket.gethostname()}"
        tags = {
            "decision": decision.kind,
            "reason": decision.reason,
            "when": when,
            "who": who,
            "commit": git_commit() or "unknown",
            "against": decision.against or "",
            "numbers": json.dumps(decision.numbers, sort_keys=True),
        }
        for key, value in tags.items():
            client.set_model_version_tag(self.name, version, DECISION_PREFIX + key, value)
        if decision.kind != "refused":
            client.set_model_version_tag(self.name, version, PROMOTED, f"{when} {decision.reason}")
        described = client.get_model_version(self.name, version).description or ""
        line = f"{when} {decision.kind} by {who}: {decision.reason}"
        client.update_model_version(self.name, version, with_decision(described, line))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the model's alias against other commands on this project folder for the length of a block."""
        path = self.project.root / "registry" / f"{self.name}.lock"
        end = time.monotonic() + LOCK_SECONDS
        while True:
            with locked(path) as acquired:
                if acquired:
                    yield
                    return
            if time.monotonic() > end:
                raise JobError(
                    f"another command has been changing the champion of {self.name!r} for {LOCK_SECONDS} s: run this one again."
                )

    def _history(self) -> list[str]:
        """The champions before this one, oldest first; of a model of an earlier version, by the tags of its versions."""
        model = self.store.client.get_registered_model(self.name)
        kept = model.tags.get(HISTORY)
        if kept is not None:
            return [version for version in kept.split(",") if version]
        before = {str(v.version): v.tags.get(PREVIOUS) for v in versions_of(self.store, self.name)}
        found: list[str] = []
        version = before.get(self.present() or "")
        while version and version not in found:
            found.insert(0, version)
            version = before.get(version)
        return found

    def _keep_history(self, history: list[str]) -> None:
        self.store.client.set_registered_model_tag(self.name, HISTORY, ",".join(history))


def compare_stored_scores(version: Any, champion: Any | None) -> str:
    """Why a version is better than the champion by the scores of the training.

    Raises UserError where those cannot be compared, JobError where it is not better.
    """
    if champion is None:
        return "first champion"
    try:
        scores = stored_scores(version, champion)
    except NotComparableError as error:
        raise UserError(
            f"the stored scores of version {version.version} and champion {champion.version} cannot be compared: {error}; leave out "
            "--reuse-scores to score both under one protocol."
        ) from None
    metric, new, old = scores.metric, scores.new, scores.old
    if not scores.better:
        raise JobError(
            f"version {version.version} has {metric} {new:.4g} and champion {champion.version} has {old:.4g}: it is not "
            'better; pass --force "REASON" to promote it all the same.'
        )
    return f"{metric} {new:.6g} is better than {old:.6g} (stored scores of one evaluation each, without their noise)"


def _named(version: str | None) -> str:
    return "no champion" if version is None else f"champion {version}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container's user id need not have a name.
        return "unknown"
