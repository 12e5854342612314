"""Shards from elsewhere, kept on a local disk: found by content, bounded, shared by the processes of a machine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from threading import Event

from soflow_pipelines.shards.tables import ShardRecord
from soflow_pipelines.storage.object_store import ObjectStore, StorageError

FOLDER_VARIABLE = "SOFLOW_CACHE"
LIMIT_VARIABLE = "SOFLOW_CACHE_GB"
DEFAULT_LIMIT = 32 * 10**9
ATTEMPTS = 5
CHUNK = 4 * 2**20
FIRST_PAUSE = 0.2  # seconds; doubled after each attempt


class ShardCache:
    """A folder of shards named by their SHA-256, so that another set's shard of the same name is another file.

    A file is complete or absent. What is being fetched is reserved at its full size under a lock, so the
    files never exceed `limit` bytes together; the least recently opened go first. A file that is removed
    while a process has it open stays readable there. Processes that want the same shard wait for one of
    them to fetch it.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    @classmethod
    def of_machine(cls) -> ShardCache:
        """The folder $SOFLOW_CACHE (~/.cache/soflow/shards) with $SOFLOW_CACHE_GB (32) gigabytes."""
        folder = os.environ.get(FOLDER_VARIABLE) or "~/.cache/soflow/shards"
        text = os.environ.get(LIMIT_VARIABLE)
        try:
            limit = round(float(text) * 10**9) if text else DEFAULT_LIMIT
        except ValueError:
            raise StorageError(f"{LIMIT_VARIABLE}={text} is not a number of gigabytes.") from None
        return cls(Path(folder).expanduser(), limit)

    def open(self, storage: ObjectStore, record: ShardRecord) -> int:
        """A descriptor of the shard for reading, fetched first where it is not here. StorageError."""
        while True:
            path = self.fetch(storage, record)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # another process made room in between
            # By descriptor: the name may be gone by now, and the content is still here.
            os.utime(descriptor)
            return descriptor

    def fetch(self, storage: ObjectStore, record: ShardRecord, stop: Event | None = None) -> Path:
        """The local path of the shard; it may be gone again when another process needs the room.

        `stop`, when it is set, ends a fetch that nobody waits for any more, with StorageError.
        """
        path = self.folder / f"{record.sha256}.tar"
        if path.exists():
            return path
        if record.bytes > self.limit:
            raise StorageError(
                f"{record.name} has {record.bytes} bytes, the cache {self.folder} may hold {self.limit}: "
                f"set {LIMIT_VARIABLE}."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{record.sha256}.part"
        with _locked(part) as descriptor:
            if path.exists():
                part.unlink()
                return path
            try:
                self._reserve(descriptor, record.bytes)
                _download(storage, record, descriptor, stop or Event())
                # Under the lock: who makes room meanwhile would count it under neither name.
                with _locked(self.folder / "lock"):
                    os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        return path

    def _reserve(self, descriptor: int, size: int) -> None:
        """Makes room and takes it, waiting for fetches of other processes where they fill the cache."""
        while True:
            with _locked(self.folder / "lock"):
                if self._make_room(size):
                    os.ftruncate(descriptor, size)
                    return
            time.sleep(0.05)

    def _make_room(self, size: int) -> bool:
        files: list[tuple[float, int, Path]] = []
        total = size
        for path in self.folder.iterdir():
            if path.suffix not in (".tar", ".part"):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # dropped by its owner just now
            if path.suffix == ".part" and status.st_size and _dropped(path):
                continue
            total += status.st_size
            if path.suffix == ".tar":
                files.append((status.st_mtime, status.st_size, path))
        for _, length, path in sorted(files):
            if total <= self.limit:
                break
            path.unlink(missing_ok=True)
            total -= length
        return total <= self.limit


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Opens and locks a file, waiting for its turn; the descriptor is of the file that is there now."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _same_file(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _dropped(part: Path) -> bool:
    """Removes what a killed process was fetching: its lock went with it."""
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _same_file(descriptor, part):
            part.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _download(storage: ObjectStore, record: ShardRecord, descriptor: int, stop: Event) -> None:
    """Fills the file. After a cut it goes on where it stopped; StorageError after ATTEMPTS in vain."""
    checksum, done, failures = hashlib.sha256(), 0, 0
    while done < record.bytes:
        reason = "the connection ended early"
        before = done
        try:
            with storage.open(record.name, done) as source:
                while not stop.is_set() and (chunk := source.read(min(CHUNK, record.bytes - done))):
                    os.pwrite(descriptor, chunk, done)
                    checksum.update(chunk)
                    done += len(chunk)
        except (OSError, HTTPException, StorageError) as error:
            reason = str(error) or type(error).__name__
        if stop.is_set():
            raise StorageError(f"{storage.uri}: the fetch of {record.name} was stopped.")
        if done < record.bytes:
            failures = failures + 1 if done == before else 1
            if failures >= ATTEMPTS:
                raise StorageError(
                    f"{storage.uri}: {record.name} could not be fetched, "
                    f"{done} of {record.bytes} bytes after {ATTEMPTS} attempts: {reason.splitlines()[0]}"
                )
            stop.wait(FIRST_PAUSE * 2 ** (failures - 1))
    if checksum.hexdigest() != record.sha256:
        raise StorageError(
            f"{storage.uri}: {record.name} has not the bytes that the manifest says (SHA-256 differs)."
        )
