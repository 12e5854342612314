"""Where a shard set lies: a folder here, in S3 or behind a web server, read and written by name."""

from __future__ import annotations

from pathlib import Path

from soflow_pipelines.storage.http import WebFolder
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import ObjectStore, StorageError
from soflow_pipelines.storage.s3 import S3Folder


def open_storage(uri: str | Path) -> ObjectStore:
    """The storage behind a folder, `file://`, `s3://bucket/prefix` or `https://host/path`. Nothing is opened yet."""
    text = str(uri)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalFolder(Path(text).expanduser())
    if scheme == "file":
        return LocalFolder(Path("/" + rest.lstrip("/")))
    if scheme == "s3":
        return S3Folder(text)
    if scheme in ("http", "https"):
        return WebFolder(text)
    raise StorageError(f"{text}: {scheme}:// is not understood; there are folders, file://, s3://, https://.")
