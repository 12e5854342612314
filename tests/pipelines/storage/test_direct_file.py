"""A file that is written past the page cache has the bytes and the checksum of one that is written through it."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from soflow_pipelines.storage import direct_file
from soflow_pipelines.storage.direct_file import ALIGNMENT, BLOCK, write_hashed

LENGTHS = [
    (),
    (0,),
    (1,),
    (ALIGNMENT,),
    (BLOCK,),
    (BLOCK - 1, 2),
    (7, BLOCK + ALIGNMENT, 5),
    (2 * BLOCK + 13,),
]


def parts_of(lengths: tuple[int, ...]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, length, dtype=np.uint8) for length in lengths]


def assert_written(path: Path, lengths: tuple[int, ...]) -> None:
    parts = parts_of(lengths)
    content = b"".join(part.tobytes() for part in parts)
    assert write_hashed(path, parts) == hashlib.sha256(content).hexdigest()
    assert path.read_bytes() == content


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_parts_stand_one_after_the_other(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    assert_written(tmp_path / "file", lengths)


def test_a_file_that_was_longer_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 2 * BLOCK)
    assert_written(tmp_path / "file", (100,))


def test_bytes_and_arrays_may_be_mixed(tmp_path: Path) -> None:
    write_hashed(tmp_path / "file", (b"head", np.arange(3, dtype=np.uint8)))
    assert (tmp_path / "file").read_bytes() == b"head\x00\x01\x02"


def refuses_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.open

    def opened(path: Path, flags: int, mode: int) -> int:
        if flags & direct_file.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(path, flags, mode)

    monkeypatch.setattr(direct_file.os, "open", opened)


def refuses_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    original = os.write

    def write(file: int, content: memoryview) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & direct_file.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(file, content)

    monkeypatch.setattr(direct_file.os, "write", write)


def writes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.write
    monkeypatch.setattr(
        direct_file.os, "write", lambda file, content: original(file, content[: 3 * ALIGNMENT + 5])
    )


@pytest.mark.parametrize("behaviour", [refuses_to_open, refuses_to_write, writes_in_pieces])
def test_a_file_system_may_refuse_what_is_past_its_cache_and_cut_writes_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: Callable[[pytest.MonkeyPatch], None]
) -> None:
    behaviour(monkeypatch)
    for lengths in [(ALIGNMENT,), (BLOCK + 2 * ALIGNMENT + 1,)]:
        assert_written(tmp_path / "file", lengths)


@pytest.mark.parametrize("length", [BLOCK, 100])
def test_a_file_that_may_not_grow_is_an_error(tmp_path: Path, length: int) -> None:
    """Of a limit of the process, as of a disk that is full."""
    program = (
        "import resource, signal, numpy\n"
        "from pathlib import Path\n"
        "from soflow_pipelines.storage.direct_file import write_hashed\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try:\n"
        f"    write_hashed(Path('file'), [numpy.zeros({length}, numpy.uint8)])\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "File too large\n", done.stderr
