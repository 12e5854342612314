"""Cache of remote shards on a local disk: keyed by content, bounded in size, shared by the processes of a machine."""

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

from soflow_core.failures import summarize
from soflow_pipelines.shards.info import ShardError
from soflow_pipelines.shards.tables import MANIFEST_NAME, ShardRecord
from soflow_pipelines.storage.object_store import LocationError, ObjectStore, StorageError

FOLDER_VARIABLE = "SOFLOW_CACHE"
LIMIT_VARIABLE = "SOFLOW_CACHE_GB"
DEFAULT_LIMIT = 32 * 10**9
"""Bytes."""
ATTEMPTS = 5
"""Attempts in a row that bring no byte before a download is given up."""
CHUNK = 4 * 2**20
FIRST_PAUSE = 0.2
"""Seconds after an attempt that brought no byte, doubled after each further one."""
ROOM_POLL_SECONDS = 0.05
COUNTED_SECONDS = 60.0
"""The bytes of all files are counted again after this time, and where a shard does not fit, not for each shard."""
LONGEST_COUNT = 64
"""Bytes in the lock file."""
MANY_FILES, SLACK = 1024, 64
"""Of a full cache of more files, this part of the limit is freed at once, so that they are not listed for each shard."""


class ShardCache:
    """A folder of shards named by their SHA-256, so that shards of the same name in two sets are two files.

    A file is complete or absent. A download takes its full size under a lock before it begins, so the files
    never exceed `limit` bytes together; the least recently opened are removed first. A file that is removed
    while a process has it open stays readable there. Processes that need the same shard wait for one of them
    to download it: they lock the partial file, which therefore has a fixed name.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    @classmethod
    def of_machine(cls) -> ShardCache:
        """The cache $SOFLOW_CACHE (~/.cache/soflow/shards) of $SOFLOW_CACHE_GB (32) gigabytes. Raises LocationError."""
        folder = os.environ.get(FOLDER_VARIABLE) or "~/.cache/soflow/shards"
        text = os.environ.get(LIMIT_VARIABLE)
        try:
            limit = round(float(text) * 10**9) if text else DEFAULT_LIMIT
        except (ValueError, OverflowError):
            raise LocationError(f"{LIMIT_VARIABLE}={text} is not a number of gigabytes.") from None
        return cls(Path(folder).expanduser(), limit)

    def open(self, store: ObjectStore, record: ShardRecord) -> int:
        """A file descriptor for reading the shard, which is downloaded where it is missing. Raises as `fetch` does."""
        while True:
            path = self.fetch(store, record)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # another process removed it in between
            # By descriptor: the name may have been removed by now.
            os.utime(descriptor)
            return descriptor

    def fetch(self, store: ObjectStore, record: ShardRecord, stop: Event | None = None) -> Path:
        """The local path of the shard, downloaded where it is missing; another process may remove it again for room.

        Raises StorageError where it cannot be downloaded and once `stop` is set, ShardError where its checksum differs, LocationError
        where it is larger than the cache.
        """
        path = self.folder / f"{record.sha256}.tar"
        if path.exists():
            return path
        if record.bytes > self.limit:
            raise LocationError(
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
                _download(store, record, descriptor, stop or Event())
                # Under the lock: otherwise a process that counts the files meanwhile could miss it under both names.
                with _locked(self.folder / "lock"):
                    os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        return path

    def _reserve(self, descriptor: int, size: int) -> None:
        """Makes room and takes it; waits while downloads of other processes fill the cache."""
        while True:
            with _locked(self.folder / "lock") as lock:
                if self._take(lock, size):
                    os.ftruncate(descriptor, size)
                    return
            time.sleep(ROOM_POLL_SECONDS)

    def _take(self, lock: int, size: int) -> bool:
        """Whether `size` bytes fit; they are added to the count, which is kept in the lock file.

        The count is never too low: a download that fails, or a file that is removed, stays in it until all are counted again.
        """
        total, counted_at = _last_count(lock)
        if not 0 <= time.time() - counted_at < COUNTED_SECONDS or total + size > self.limit:
            total, counted_at = self._make_room(size), int(time.time())
        fits = total + size <= self.limit
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{total + fits * size} {counted_at}".encode(), 0)
        return fits

    def _make_room(self, size: int) -> int:
        """Removes the least recently opened shards until `size` bytes fit, as far as that is possible; the bytes that are left."""
        files: list[tuple[float, int, Path]] = []
        total = 0
        for path in self.folder.iterdir():
            if path.suffix not in (".tar", ".part"):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # removed by another process just now
            if path.suffix == ".part" and status.st_size and _remove_abandoned(path):
                continue
            total += status.st_size
            if path.suffix == ".tar":
                files.append((status.st_mtime, status.st_size, path))
        room = self.limit - size
        if total > room and len(files) > MANY_FILES:
            room -= self.limit // SLACK
        for _, length, path in sorted(files):
            if total <= room:
                break
            path.unlink(missing_ok=True)
            total -= length
        return total


def _last_count(lock: int) -> tuple[int, int]:
    """(bytes, Unix time of the last count of all files) in the lock file; zeros where there is none.

    Versions before kept none and may share the folder, so that a count is good for a short time.
    """
    try:
        total, counted_at = os.pread(lock, LONGEST_COUNT, 0).split()
        return int(total), int(counted_at)
    except ValueError:
        return 0, 0


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Opens and locks a file, and yields its descriptor. The file is the one that has the name once the lock is held."""
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


def _remove_abandoned(part: Path) -> bool:
    """Removes the partial file of a process that was killed, which nobody locks any more; whether it is gone."""
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


def _download(store: ObjectStore, record: ShardRecord, descriptor: int, stop: Event) -> None:
    """Fills the file. A connection that breaks is opened again where it stopped.

    Raises StorageError after ATTEMPTS that bring no byte and once `stop` is set, ShardError where the checksum differs.
    """
    checksum, done, failures = hashlib.sha256(), 0, 0
    while done < record.bytes:
        reason = "the connection ended early"
        before = done
        try:
            with store.open(record.name, done) as source:
                while not stop.is_set() and (chunk := source.read(min(CHUNK, record.bytes - done))):
                    os.pwrite(descriptor, chunk, done)
                    checksum.update(chunk)
                    done += len(chunk)
        except (OSError, HTTPException, StorageError) as error:
            reason = summarize(error)
        if stop.is_set():
            raise StorageError(f"{store.uri}: the download of {record.name} was stopped.")
        if done < record.bytes:
            failures = failures + 1 if done == before else 1
            if failures >= ATTEMPTS:
                raise StorageError(
                    f"{store.uri}: {record.name} could not be fetched, "
                    f"{done} of {record.bytes} bytes after {ATTEMPTS} attempts: {reason}."
                )
            stop.wait(FIRST_PAUSE * 2 ** (failures - 1))
    if checksum.hexdigest() != record.sha256:
        # Another attempt would bring the same bytes: it is the set that is wrong, not the connection.
        raise ShardError(
            f"{store.uri}: {record.name} has not the bytes that {MANIFEST_NAME} lists (SHA-256 differs): the set is damaged, or was "
            "changed while it was read; copy it there again from where it was prepared."
        )
