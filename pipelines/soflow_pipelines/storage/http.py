"""soflow_pipelines.storage.http"""

from __future__ import annotations

import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote, urlsplit, urlunsplit

from soflow_pipelines.storage.object_store import StorageError
from soflow_pipelines.storage.s3 import CHUNK

WEB_TIMEOUT = 30.0  # seconds without a byte


class WebFolder:
    """`https://host/path` (or http): read by name with range requests; it cannot be listed or written."""

    def __init__(self, uri: str) -> None:
        self._parts = urlsplit(uri)
        self._uri = uri

    @property
    def uri(self) -> str:
        return self._uri

    def _address(self, name: str) -> str:
        return urlunsplit(self._parts._replace(path=f"{self._parts.path.rstrip('/')}/{quote(name)}"))

    def read(self, name: str) -> bytes:
        try:
            with self.open(name) as file:
                return file.read()
        except (OSError, HTTPException) as error:
            raise StorageError(f"{self._address(name)} cannot be read: {error}.") from error

    def open(self, name: str, start: int = 0) -> BinaryIO:
        request = urllib.request.Request(self._address(name))
        if start:
            request.add_header("Range", f"bytes={start}-")
        response = self._ask(request)
        if start and response.status != 206:
            # The server gives no ranges: what was read already is read past.
            remaining = start
            while remaining and (skipped := len(response.read(min(CHUNK, remaining)))):
                remaining -= skipped
        return cast(BinaryIO, response)

    def size(self, name: str) -> int | None:
        try:
            with self._ask(urllib.request.Request(self._address(name), method="HEAD")) as response:
                length = response.headers.get("Content-Length")
        except StorageError as error:
            if isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code in (404, 410):
                return None
            raise
        if length is None:
            raise StorageError(f"{self._address(name)}: the server does not say how long the file is.")
        return int(length)

    def _ask(self, request: urllib.request.Request) -> Any:
        try:
            return urllib.request.urlopen(request, timeout=WEB_TIMEOUT)
        except urllib.error.HTTPError as error:
            raise StorageError(f"{request.full_url} cannot be read: {error.code} {error.reason}.") from error
        except OSError as error:
            raise StorageError(f"{request.full_url} cannot be read: {_reason(error)}.") from error

    def names(self) -> list[str]:
        raise StorageError(f"{self._uri}: a web server does not list its files.")

    def write(self, name: str, content: bytes) -> None:
        raise StorageError(f"{self._uri} can only be read; {name} ({len(content)} bytes) was not written.")

    def publish(self, name: str, local: Path) -> None:
        raise StorageError(f"{self._uri} can only be read; {name} stays at {local}.")

    def remove(self, name: str) -> None:
        raise StorageError(f"{self._uri} can only be read; {name} was not removed.")


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error)
