"""Members of tar files, up to the end mark."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from soflow_core.failures import printable
from soflow_pipelines.sources.source import SourceError

REMEDY = "the file is cut or damaged, copy or download it again."


def members_of(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of an open archive, in their order.

    Python's reader ends without an error at a header that is damaged or cut, and where the file ends between two members: what follows
    would be lost. Raises SourceError where it ends before the end mark, a block of zeros, and for a member of a negative size, from
    which it would go back.
    """
    for member in archive:
        if member.size < 0:
            raise SourceError(f"{path}: {printable(member.name)} has {member.size} bytes: {REMEDY}")
        yield member
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise SourceError(
            f"{path}: no member and no end mark can be read from byte {archive.offset} on: {REMEDY}"
        )
