"""The shard cache: bounded at every moment, safe for processes that race and that die."""

import fcntl
import functools
import http.server
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soflow_pipelines.shards.cache import ShardCache
from soflow_pipelines.shards.info import DatasetInfo, ShardError
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.tables import ShardRecord, read_manifest
from soflow_pipelines.shards.writer import Sample, write_shards
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import LocationError
from soflow_pipelines.storage.opening import open_storage
from tests.support.fork_server import fork_server

INFO = DatasetInfo(kind="pixels", shape=(1, 64, 64), dtype="uint8")


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards of about 50 kB."""
    folder = tmp_path_factory.mktemp("origin") / "set"
    rng = np.random.default_rng(0)
    samples = (Sample(f"{i:04d}", rng.integers(0, 256, (1, 64, 64)).astype(np.uint8)) for i in range(120))
    write_shards(samples, folder, INFO, per_shard=10)
    return folder


def held(folder: Path) -> int:
    """Bytes of all files at one moment: room is made and taken, and files are published, under the lock."""
    sizes: dict[int, int] = {}
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in (path for path in folder.iterdir() if path.name != "lock"):
            with suppress(FileNotFoundError):
                status = path.stat()
                sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def test_what_is_fetched_is_kept_by_content(origin: Path, tmp_path: Path) -> None:
    cache, store = ShardCache(tmp_path, 10**8), open_storage(origin)
    record = read_manifest(origin)[3]
    path = cache.fetch(store, record)
    assert path.name == f"{record.sha256}.tar"
    assert path.read_bytes() == (origin / record.name).read_bytes()
    assert cache.fetch(store, record) == path


def test_other_bytes_than_the_manifest_lists_are_a_damaged_set_and_no_outage(
    origin: Path, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path, 10**8)
    record = replace(read_manifest(origin)[3], sha256="0" * 64)
    with pytest.raises(ShardError, match=r"shard-000003\.tar has not the bytes .* copy it there again"):
        cache.fetch(open_storage(origin), record)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_least_recently_opened_goes_first(origin: Path, tmp_path: Path) -> None:
    records = read_manifest(origin)
    cache, store = ShardCache(tmp_path, 3 * records[0].bytes), open_storage(origin)
    for shard in (0, 1, 2, 0, 3):
        os.close(cache.open(store, records[shard]))
        time.sleep(0.01)
    kept = {path.stem for path in tmp_path.glob("*.tar")}
    assert kept == {records[shard].sha256 for shard in (2, 0, 3)}


def test_a_shard_that_was_dropped_stays_readable_where_it_is_open(origin: Path, tmp_path: Path) -> None:
    records = read_manifest(origin)
    cache, store = ShardCache(tmp_path, records[0].bytes), open_storage(origin)
    descriptor = cache.open(store, records[0])
    os.close(cache.open(store, records[1]))
    assert [path.stem for path in tmp_path.glob("*.tar")] == [records[1].sha256]
    assert os.pread(descriptor, 1 << 20, 0) == (origin / records[0].name).read_bytes()
    os.close(descriptor)


def test_a_shard_larger_than_the_cache_is_refused(origin: Path, tmp_path: Path) -> None:
    record = read_manifest(origin)[0]
    with pytest.raises(LocationError, match="SOFLOW_CACHE_GB"):
        ShardCache(tmp_path, record.bytes - 1).fetch(open_storage(origin), record)


def test_a_cache_smaller_than_what_is_mixed_is_refused(origin: Path, tmp_path: Path) -> None:
    with (
        serve(origin) as address,
        pytest.raises(LocationError, match=r"shuffled over .* SOFLOW_CACHE_GB to at least"),
    ):
        ShardLoader(address, 4, cache=ShardCache(tmp_path, 100_000))


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
    finally:
        httpd.shutdown()
        httpd.server_close()


def test_the_size_in_the_environment_must_be_a_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOFLOW_CACHE", str(tmp_path))
    monkeypatch.setenv("SOFLOW_CACHE_GB", "1.5")
    cache = ShardCache.of_machine()
    assert (cache.folder, cache.limit) == (tmp_path, 1_500_000_000)
    for text in ("lots", "inf", "nan"):
        monkeypatch.setenv("SOFLOW_CACHE_GB", text)
        with pytest.raises(LocationError, match=f"SOFLOW_CACHE_GB={text} is not a number"):
            ShardCache.of_machine()


class SlowFolder(LocalFolder):
    """A folder that logs each file that is opened, and takes 0.05 s to open it."""

    def open(self, name: str, start: int = 0):
        with (self.folder.parent / "opened").open("a") as log:
            log.write(f"{name}\n")
        time.sleep(0.05)
        return super().open(name, start)


def _read_many(origin: Path, cache: ShardCache, seed: int) -> int:
    store = SlowFolder(origin)
    records = read_manifest(origin)
    good = 0
    for shard in np.random.default_rng(seed).integers(0, len(records), 40):
        descriptor = cache.open(store, records[shard])
        good += os.pread(descriptor, 1 << 20, 0) == (origin / records[shard].name).read_bytes()
        os.close(descriptor)
    return good


def test_processes_that_race_read_right_bytes_within_the_bound(origin: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 4 * read_manifest(origin)[0].bytes)
    cache.folder.mkdir()
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(held(cache.folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with fork_server().Pool(3) as pool:
        good = pool.starmap(_read_many, [(origin, cache, seed) for seed in range(3)])
    done.set()
    watcher.join()
    assert good == [40, 40, 40]
    assert max(seen) <= cache.limit
    assert not list(cache.folder.glob("*.part"))


def test_what_is_fetched_appears_only_while_nobody_counts_the_files(origin: Path, tmp_path: Path) -> None:
    class Counted(LocalFolder):
        """While a shard is read from it, somebody begins to count."""

        def open(self, name: str, start: int = 0) -> Any:
            self.counting = (cache.folder / "lock").open("a")
            fcntl.flock(self.counting, fcntl.LOCK_EX)
            return super().open(name, start)

    cache, store, record = ShardCache(tmp_path / "cache", 10**8), Counted(origin), read_manifest(origin)[2]
    path = cache.folder / f"{record.sha256}.tar"
    fetching = threading.Thread(target=cache.fetch, args=(store, record))
    fetching.start()
    fetching.join(0.5)
    assert fetching.is_alive()
    assert not path.exists()
    store.counting.close()
    fetching.join()
    assert path.read_bytes() == (origin / record.name).read_bytes()


def test_threads_that_want_one_shard_fetch_it_once(origin: Path, tmp_path: Path) -> None:
    cache, store = ShardCache(tmp_path / "cache", 10**8), SlowFolder(origin)
    record = read_manifest(origin)[5]
    log = origin.parent / "opened"
    log.unlink(missing_ok=True)
    threads = [threading.Thread(target=cache.fetch, args=(store, record)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.read_text().splitlines() == [record.name]


class StuckFolder(LocalFolder):
    """A folder whose files take ten minutes to open."""

    def open(self, name: str, start: int = 0):
        time.sleep(600)
        return super().open(name, start)


def _get_stuck(origin: Path, cache: ShardCache, record: ShardRecord) -> None:
    cache.fetch(StuckFolder(origin), record)


def test_what_a_killed_process_was_fetching_does_not_fill_the_cache(origin: Path, tmp_path: Path) -> None:
    records = read_manifest(origin)
    cache = ShardCache(tmp_path, records[0].bytes)
    process = fork_server().Process(target=_get_stuck, args=(origin, cache, records[0]))
    process.start()
    part = tmp_path / f"{records[0].sha256}.part"
    while not part.exists() or not part.stat().st_size:
        assert process.is_alive()
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    path = cache.fetch(open_storage(origin), records[1])
    assert path.exists()
    assert not part.exists()


def test_the_files_are_not_listed_for_each_shard(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 100,000 shards, listing them for each of them would take days."""
    counts: list[int] = []
    make_room = ShardCache._make_room

    def counted(self: ShardCache, size: int) -> int:
        counts.append(size)
        return make_room(self, size)

    monkeypatch.setattr(ShardCache, "_make_room", counted)
    records, store = read_manifest(origin), open_storage(origin)
    cache = ShardCache(tmp_path, 8 * records[0].bytes)
    for record in records[:8]:
        cache.fetch(store, record)
    assert len(counts) == 1
    for record in records[8:]:
        cache.fetch(store, record)
        assert held(tmp_path) <= cache.limit


def test_a_full_cache_of_many_files_frees_some_at_once(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soflow_pipelines.shards.cache.MANY_FILES", 3)
    monkeypatch.setattr("soflow_pipelines.shards.cache.SLACK", 2)
    records, store = read_manifest(origin), open_storage(origin)
    cache = ShardCache(tmp_path, 4 * records[0].bytes)
    for record in records[:5]:
        cache.fetch(store, record)
    assert {path.stem for path in tmp_path.glob("*.tar")} == {
        each.sha256 for each in (records[3], records[4])
    }
