"""Files of this machine that are complete or absent: written aside, then renamed; checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def atomic(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name when the block ends without an exception.

    A reader sees the old content or the new one, never a part. The bytes go to a file beside it whose name is random, so that
    processes, containers and machines that share the folder never write to the same one; it is removed where the block fails.
    `durable` has content and name on the disk before this returns. Parent folders are created. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with aside.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, path)
        if durable:
            sync_folder(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file that is complete or absent."""
    with atomic(path, durable=durable) as file:
        file.write(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that is complete or absent, and on the disk when this returns."""
    write_bytes(path, json.dumps(content, indent=1).encode(), durable=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, or None where there is none."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """SHA-256 of an open file's bytes, from its beginning."""
    checksum = hashlib.sha256()
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        checksum.update(block)
    return checksum.hexdigest()
