"""Files that are published whole: a reader sees the old content or the new one, and nothing is left beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from soflow_pipelines.preparation.builtin import ensure_builtin
from soflow_pipelines.storage.files import (
    atomic,
    move,
    sha256,
    short_digest,
    sync_files,
    temporary_folder,
    write_bytes,
)
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import StorageError
from tests.support.small_disks import mounted

MEBIBYTE = 2**20
WRITES = 40
WRITER = """
import os, sys
from pathlib import Path
from soflow_pipelines.storage.files import write_bytes, write_json
from soflow_pipelines.storage.local import LocalFolder
folder, letter, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print(os.getpid(), flush=True)
sys.stdin.readline()
for _ in range(count):
    LocalFolder(folder).write("stored", letter.encode() * 2**20)
    write_json(folder / "status.json", {"letter": letter, "padding": letter * 2**20})
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_file_has_its_old_content_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "nested" / "file"
    write_bytes(path, b"old")
    with atomic(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


def test_writers_of_one_process_id_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """As two containers on a shared folder may be: the file that is finished first is not changed by the other."""
    path = tmp_path / "status.json"
    with atomic(path) as first:
        first.write(b"first, ")
        with atomic(path) as second:
            second.write(b"second, whole")
        assert path.read_bytes() == b"second, whole"
        first.write(b"whole")
        first.flush()
        assert path.read_bytes() == b"second, whole"
    assert path.read_bytes() == b"first, whole"
    assert names(tmp_path) == ["status.json"]


def test_processes_of_one_id_on_one_folder_publish_only_whole_files(tmp_path: Path) -> None:
    """Two writers, each process 1 of its own PID namespace, and a reader that looks all the time."""
    alone = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a PID namespace cannot be created here: root is needed")
    writers = [
        subprocess.Popen(
            [*alone, sys.executable, "-c", WRITER, str(tmp_path), letter, str(WRITES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for letter in "ab"
    ]
    assert [writer.stdout.readline() for writer in writers if writer.stdout] == ["1\n", "1\n"]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    wholes = {
        "stored": {letter.encode() * MEBIBYTE for letter in "ab"},
        "status.json": {
            f'{{\n "letter": "{letter}",\n "padding": "{letter * MEBIBYTE}"\n}}'.encode() for letter in "ab"
        },
    }
    reads = 0
    while any(writer.poll() is None for writer in writers):
        for name, whole in wholes.items():
            if (tmp_path / name).exists():
                assert (tmp_path / name).read_bytes() in whole
                reads += 1
    assert [writer.returncode for writer in writers] == [0, 0]
    assert reads > 0
    assert names(tmp_path) == ["status.json", "stored"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")

    def write() -> None:
        with atomic(tmp_path / "file") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_leaves_nothing_of_what_did_not_fit(tmp_path: Path) -> None:
    content = bytes(2 * MEBIBYTE)
    (tmp_path / "large").write_bytes(content)
    with mounted(tmp_path / "disk", 1) as disk:
        store = LocalFolder(disk / "store")
        store.write("small", b"kept")
        for durable in (True, False):
            with pytest.raises(OSError, match="No space left"):
                write_bytes(disk / "file", content, durable=durable)
        with pytest.raises(StorageError, match="No space left"):
            store.write("file", content)
        with pytest.raises(StorageError, match="No space left"):
            store.publish("file", tmp_path / "large")
        with pytest.raises(StorageError, match="cannot be written"):
            ensure_builtin("digits", disk / "digits")
        assert names(disk) == ["small", "store"]
        assert store.read("small") == b"kept"
    assert (tmp_path / "large").read_bytes() == content


def test_a_move_between_file_systems_publishes_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"content")
    with mounted(tmp_path / "disk", 1) as disk:
        move(tmp_path / "source", disk / "nested" / "file")
        assert (disk / "nested" / "file").read_bytes() == b"content"
        assert names(disk / "nested") == ["file"]
        assert not (tmp_path / "source").exists()


def test_a_move_within_a_file_system_replaces_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"new")
    write_bytes(tmp_path / "nested" / "file", b"old")
    move(tmp_path / "source", tmp_path / "nested" / "file")
    assert (tmp_path / "nested" / "file").read_bytes() == b"new"
    assert names(tmp_path) == ["file", "nested"]


def test_a_temporary_folder_is_gone_unless_it_was_renamed(tmp_path: Path) -> None:
    target = tmp_path / "nested" / "set"
    with temporary_folder(target) as failed:
        (failed / "file").write_bytes(b"content")
    assert names(tmp_path) == ["nested"]
    with temporary_folder(target) as finished:
        (finished / "file").write_bytes(b"content")
        finished.rename(target)
    assert names(tmp_path) == ["file", "nested", "set"]


def test_threads_that_write_one_file_leave_one_of_their_contents(tmp_path: Path) -> None:
    contents = [bytes([number]) * 100_000 for number in range(8)]
    threads = [
        threading.Thread(target=write_bytes, args=(tmp_path / "file", content)) for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() in contents
    assert names(tmp_path) == ["file"]


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    digest = sha256(tmp_path / "file")
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert short_digest(f"sha256:{digest}") == short_digest(digest) == "ba7816bf8f01cfea"
    assert short_digest(digest, 4) == "ba78"


def test_every_file_named_and_their_folder_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "other"):
        (tmp_path / name).write_bytes(b"x")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    sync_files(tmp_path, ["a", "b"])
    assert synced == [(tmp_path / name).stat().st_ino for name in ("a", "b", "")]
    with pytest.raises(FileNotFoundError):
        sync_files(tmp_path, ["missing"])
