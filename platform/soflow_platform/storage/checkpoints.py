"""Checkpoints of a trial, in a folder or in S3: each complete or absent, and verified by checksum when it is read.

step-00000200/
  state.pt                 TrainStep's state: network, EMAs, optimizer, step
  state-000.safetensors    and so on: what of a large state is cut into parts (`training.state_files`)
  ema.safetensors          the first EMA's weights, as they are registered; a state in parts refers to them
  checkpoint.json          step, images seen, run, evaluations so far, checksums

`checkpoint.json` is written last: a step without it is no checkpoint, and one whose record cannot be read is damaged.
Files are hashed, uploaded and downloaded several at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from soflow_pipelines.storage.files import parse_json
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import ObjectStore, StorageError
from soflow_pipelines.storage.opening import open_storage
from soflow_platform.storage.checkpoint_files import (
    KeptFiles,
    at_once,
    copy_hashed,
    read_hashed,
    synced_digest,
)
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.storage.records import refuse_newer_format
from soflow_platform.storage.scratch_folder import (
    is_full,
    no_space,
    scratch_folder,
    scratch_place,
    write_failure,
)

STATE = "state.pt"
EMA = "ema.safetensors"
RECORD = "checkpoint.json"
PART = re.compile(r"state-\d{3,}\.safetensors")
PARTS_FORMAT = 2
"""Format of a record whose state is in parts, which versions before it cannot read; that of the others is 1."""
SPLIT_BYTES = 2**27
"""Bytes of tensors from which a state is cut into parts."""
WriteFiles = Callable[[Path], Mapping[str, str] | None]
"""Writes a checkpoint's files into a folder; returns the SHA-256 of those that it hashed and brought to the disk itself."""


def part_name(number: int) -> str:
    """File of a part of a state."""
    return f"state-{number:03d}.safetensors"


@dataclass(frozen=True)
class CheckpointState:
    """Progress of a trial at a checkpoint: the content of `checkpoint.json` but for the checksums."""

    step: int
    """Finished optimizer steps."""
    images: int
    """Samples seen, over all ranks: the loader's state."""
    run: str
    """MLflow run id."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Every evaluation so far: its step and its metrics."""
    pending_metrics: list[Any] = field(default_factory=list)
    """Metrics that the tracking server may not have yet; `unsent` in the file."""
    data: str | None = None
    """Digest of the training data; None in a checkpoint of an earlier version."""
    code: str | None = None
    """Digest of the code that trained since the checkpoint before (`storage.code_digest`); None in one of an earlier version."""
    start: list[dict[str, Any]] | None = None
    """Lineage of the weights that training started from; None: fresh ones."""
    draws: int | None = None
    """Version of the draws of noise, times and posterior samples (`soflow_core.random_source`); None, of an earlier version, is 1."""
    copied_from: str | None = None
    """The trial whose checkpoint of this step it is a copy of (`search.pbt`); None: the trial's own."""
    ended: str | None = None
    """The rule of `search.stop` that ended the training at this step; None where it goes on."""

    def as_record(self) -> dict[str, Any]:
        record = asdict(self)
        record["unsent"] = record.pop("pending_metrics")
        return record

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> CheckpointState:
        """Reads a record; fields that only a later version knows are ignored. Raises TypeError where a field is missing."""
        values = {**record, "pending_metrics": record.get("unsent", [])}
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    storage: ObjectStore
    name: str
    state: CheckpointState
    files: dict[str, str]
    """SHA-256 of each file."""
    compared: set[str] = field(default_factory=set, compare=False)
    """Files of a local folder whose checksum was verified already, so that many GB are hashed once."""
    kept: KeptFiles = field(default_factory=KeptFiles, compare=False)
    """What was read while it was verified (`CheckpointStore.newest` with `keep`), until its state has been read."""

    @property
    def location(self) -> str:
        """Folder or URI."""
        place, mark, options = self.storage.uri.partition("?")
        return f"{place.rstrip('/')}/{self.name}{mark}{options}"

    def files_of(self, file: str) -> list[str]:
        """The files that reading one of them needs: it, and for a state in parts also these and the averaged weights."""
        parts = [name for name in self.files if PART.fullmatch(name)] if file == STATE else []
        return [file, *parts, EMA] if parts else [file]

    def digest_of(self, file: str) -> str:
        """SHA-256 of one of the files; of all their checksums where reading it needs several."""
        names = self.files_of(file)
        if len(names) == 1:
            return self.files[file]
        return hashlib.sha256("".join(self.files[name] for name in sorted(names)).encode()).hexdigest()

    @contextlib.contextmanager
    def opened(self, file: str) -> Iterator[Path]:
        """Local path of one of the files for the length of a block, as `opened_all` has several."""
        with self.opened_all([file]) as (path,):
            yield path

    @contextlib.contextmanager
    def opened_all(self, files: Sequence[str]) -> Iterator[list[Path]]:
        """Local paths of files for the length of a block; downloaded, several at a time, where the checkpoint is remote.

        Raises StorageError where the checksum of one differs or the storage is unavailable.
        """
        if isinstance(self.storage, LocalFolder):
            for file in self._differing(files):
                raise self._damaged(file)
            yield [self.storage.path(f"{self.name}/{file}") for file in files]
            return
        with tempfile.TemporaryDirectory(prefix="soflow-checkpoint-") as folder:
            asked = {file: Path(folder) / file for file in files if file not in self.kept.copies}
            at_once(lambda file: self._download(file, asked[file]), list(asked))
            yield [asked.get(file) or self.kept.copies[file] for file in files]

    def broken_files(self, only: Collection[str] | None = None, keep: bool = False) -> list[str]:
        """Names of the files, or of those in `only` and what they need, whose checksum differs.

        With `keep` what reading the state of a remote one needs is kept as it was verified (`kept`), where none is broken.
        Raises StorageError where the storage is unavailable.
        """
        chosen: Iterable[str] = self.files
        if only is not None:
            chosen = dict.fromkeys(needed for file in only for needed in self.files_of(file))
        with contextlib.ExitStack() as kept:
            # Also where it raises: who tries again holds the error, and with it this checkpoint and its many GB.
            kept.callback(self.kept.let_go)
            broken = self._differing(chosen, keep)
            if not broken:
                kept.pop_all()
        return broken

    def _differing(self, files: Iterable[str], keep: bool = False) -> list[str]:
        needed = self.files_of(STATE) if keep else []
        local = isinstance(self.storage, LocalFolder)
        if keep and not local:
            self.kept.make_folder()

        def differs(file: str) -> bool:
            path = f"{self.name}/{file}"
            size = self.storage.size(path)
            if file not in self.files or size is None:
                return True
            # Files on this machine are mapped, from the page cache where it has room: a copy in memory of its own costs more than that.
            if file not in needed or local:
                return self._copy(file) != self.files[file]
            if file == STATE:
                self.kept.copies[file] = self.kept.make_folder() / file
                return self._copy(file, self.kept.copies[file]) != self.files[file]
            with self.storage.open(path) as source:
                digest, self.kept.contents[file] = read_hashed(source, size)
            return digest != self.files[file]

        asked = [file for file in files if file not in self.compared]
        broken = [file for file, different in zip(asked, at_once(differs, asked), strict=True) if different]
        if local:
            self.compared.update(file for file in asked if file not in broken)
        return broken

    def _download(self, file: str, path: Path) -> None:
        """Raises StorageError where the file is not that of the record."""
        if self._copy(file, path) != self.files.get(file):
            raise self._damaged(file)

    def _copy(self, file: str, path: Path | None = None) -> str:
        """SHA-256 of a file, which is copied to a path in the same pass, where there is one."""
        with self.storage.open(f"{self.name}/{file}") as source, contextlib.ExitStack() as stack:
            return copy_hashed(source, None if path is None else stack.enter_context(path.open("wb")))

    def _damaged(self, file: str) -> StorageError:
        return StorageError(f"{self.location}/{file} is damaged: its checksum differs.")


@dataclass(frozen=True)
class CheckpointStore:
    """All checkpoints of one trial."""

    root: str | Path
    """Folder or URI."""

    @classmethod
    def of_trial(cls, project: ProjectFolder, sweep: str, trial: str, base: str | None) -> CheckpointStore:
        """The store of a trial: below `base`, the setting training.checkpoints, or in the project folder where that is None."""
        if base is None:
            return cls(str(project.trial(sweep, trial) / "checkpoints"))
        place, mark, options = base.partition("?")
        return cls(f"{place.rstrip('/')}/{sweep}/{trial}{mark}{options}")

    def publish(self, state: CheckpointState, write: WriteFiles) -> Checkpoint:
        """Write a checkpoint with `write(folder)` to a scratch folder, then publish its files, several at a time, and its record last.

        Raises StorageError or OSError where it cannot be written, whatever `write` raised; there is no such checkpoint then.
        """
        storage = open_storage(self.root)
        try:
            return self._publish(storage, state, write)
        except (OSError, StorageError) as error:
            # Anywhere on the way; what an object store says of its own disks stays as it says it.
            if is_full(error) and (isinstance(storage, LocalFolder) or isinstance(error, OSError)):
                raise StorageError(no_space(scratch_place(storage))) from error
            raise

    def _publish(self, storage: ObjectStore, state: CheckpointState, write: WriteFiles) -> Checkpoint:
        name = f"step-{state.step:08d}"
        with scratch_folder(storage) as scratch:
            try:
                hashed = write(scratch) or {}
            except Exception as error:
                raise StorageError(write_failure(error, scratch)) from error
            paths = sorted(scratch.iterdir())
            digests = at_once(lambda path: hashed.get(path.name) or synced_digest(path), paths)
            files = {path.name: digest for path, digest in zip(paths, digests, strict=True)}
            # Without its record an earlier checkpoint of the same step no longer counts, so that files of the two are never mixed.
            storage.remove(f"{name}/{RECORD}")
            at_once(lambda path: storage.publish(f"{name}/{path.name}", path), paths)
        record = {**state.as_record(), "files": files}
        if any(PART.fullmatch(file) for file in files):
            record["format"] = PARTS_FORMAT
        storage.write(f"{name}/{RECORD}", json.dumps(record, indent=1).encode())
        return Checkpoint(storage, name, state, files)

    def published(self) -> list[Checkpoint]:
        """Every checkpoint whose record can be read, oldest first. The checksums of their files are not verified."""
        return [checkpoint for checkpoint in self._recorded().values() if checkpoint is not None]

    def newest(
        self, files: Collection[str] | None = None, keep: bool = False
    ) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint whose files, or those in `files`, are undamaged; and a sentence for each damaged one after it.

        With `keep` remote files are fetched once: what the state needs is kept in memory, or of `state.pt` a copy on the disk, until
        the state has been read (`training.state_files.opened_state`).
        """
        damaged: list[str] = []
        for name, checkpoint in reversed(self._recorded().items()):
            broken = [RECORD] if checkpoint is None else checkpoint.broken_files(files, keep)
            if checkpoint is not None and not broken:
                return checkpoint, damaged
            damaged.append(f"{name} is damaged ({', '.join(broken)}): going back to the one before it.")
        return None, damaged

    def best(self, metric: str, mode: str) -> tuple[Checkpoint, dict[str, Any]] | None:
        """The checkpoint with undamaged weights that has the best value of `metric`, and its evaluation; None where there is none."""
        complete = {checkpoint.state.step: checkpoint for checkpoint in self.published()}
        evaluations = complete[max(complete)].state.evaluations if complete else []
        for evaluation in ranked(evaluations, metric, mode):
            checkpoint = complete.get(evaluation["step"])
            if checkpoint is not None and not checkpoint.broken_files([EMA]):
                return checkpoint, evaluation
        return None

    def discard_after(self, step: int) -> None:
        """Discard the checkpoints of steps after `step`, from which training resumes.

        Their records are removed now and their files by the next `prune`; so is, now, what a killed process left in the scratch
        folder. Raises StorageError where the storage refuses.
        """
        storage = open_storage(self.root)
        shutil.rmtree(scratch_place(storage), ignore_errors=True)
        for name in self._recorded():
            if int(name.removeprefix("step-")) > step:
                storage.remove(f"{name}/{RECORD}")

    def prune(self, keep: int, ranking: Sequence[int] = ()) -> None:
        """Remove all checkpoints but the newest `keep` and the best one, and files that interrupted writing left behind.

        `ranking` are steps, best first; the best checkpoint is that of the first step that has one.
        """
        storage = open_storage(self.root)
        complete = {checkpoint.state.step: checkpoint.name for checkpoint in self.published()}
        kept = {complete[step] for step in sorted(complete)[-keep:]}
        kept |= {complete[step] for step in [step for step in ranking if step in complete][:1]}
        for path in sorted(storage.names(), key=lambda path: not path.endswith(RECORD)):
            name = path.partition("/")[0]
            if name.startswith("step-") and name not in kept:
                storage.remove(path)
        if isinstance(storage, LocalFolder):
            for folder in storage.folder.glob("step-*"):
                if folder.name not in kept:
                    shutil.rmtree(folder)

    def _recorded(self) -> dict[str, Checkpoint | None]:
        """Every step with a record, oldest first; None where the record is damaged."""
        storage = open_storage(self.root)
        if isinstance(storage, LocalFolder) and not storage.folder.is_dir():
            return {}
        names = [path.partition("/") for path in storage.names()]
        steps = [name for name, _, file in names if file == RECORD and name.removeprefix("step-").isdecimal()]
        recorded: dict[str, Checkpoint | None] = {}
        for name in steps:
            with _unless_removed(storage, f"{name}/{RECORD}"):
                recorded[name] = read_record(storage, name)
        return recorded


@contextlib.contextmanager
def _unless_removed(storage: ObjectStore, file: str) -> Iterator[None]:
    """Ignores a StorageError for a file that no longer exists: a running trial removes old checkpoints at any time."""
    try:
        yield
    except StorageError:
        if storage.size(file) is not None:
            raise


def read_record(storage: ObjectStore, name: str) -> Checkpoint | None:
    """The checkpoint of this name; None where its record is damaged.

    Raises InputError where its format is newer than this version reads, and StorageError where it cannot be read at all.
    """
    content = storage.read(f"{name}/{RECORD}")
    try:
        record = parse_json(content)
    except ValueError:
        return None
    if isinstance(record, dict):
        refuse_newer_format(record, f"{storage.uri}/{name}/{RECORD}", PARTS_FORMAT)
    try:
        return Checkpoint(storage, name, CheckpointState.from_record(record), dict(record["files"]))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def ranked(evaluations: list[dict[str, Any]], metric: str, mode: str) -> list[dict[str, Any]]:
    """The evaluations with a value of `metric` that is not NaN, best first; of equal ones the earlier comes first."""
    scored = [e for e in evaluations if e.get(metric) is not None and e[metric] == e[metric]]
    return sorted(scored, key=lambda e: e[metric] if mode == "min" else -e[metric])


def best_evaluation(evaluations: list[dict[str, Any]], metric: str, mode: str) -> dict[str, Any] | None:
    """The evaluation with the best value of `metric`; NaN is never best."""
    return next(iter(ranked(evaluations, metric, mode)), None)
