"""A folder of a web server as an object store that can be read but neither listed nor written."""

from __future__ import annotations

import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote, urlsplit, urlunsplit

from soflow_pipelines.storage.object_store import StorageError

WEB_TIMEOUT = 30.0
"""Seconds without a byte after which a connection is given up."""
SKIP_BYTES = 8 * 2**20


class WebFolder:
    """`https://host/path` (or http): files are read by name, with range requests."""

    def __init__(self, uri: str) -> None:
        self._parts = urlsplit(uri)
        self._uri = uri

    @property
    def uri(self) -> str:
        """The URI that the store was opened with."""
        return self._uri

    def _address(self, name: str) -> str:
        return urlunsplit(self._parts._replace(path=f"{self._parts.path.rstrip('/')}/{quote(name)}"))

    def read(self, name: str) -> bytes:
        """The content of a file. Raises StorageError."""
        try:
            with self.open(name) as file:
                return file.read()
        except (OSError, HTTPException) as error:
            raise StorageError(f"{self._address(name)} cannot be read: {error}.") from error

    def open(self, name: str, start: int = 0) -> BinaryIO:
        """Opens a file for reading, from the byte `start` on. Raises StorageError."""
        request = urllib.request.Request(self._address(name))
        if start:
            request.add_header("Range", f"bytes={start}-")
        response = self._send(request)
        if start and response.status != 206:
            # The server does not support ranges: it sends the file from its beginning.
            remaining = start
            while remaining and (skipped := len(response.read(min(SKIP_BYTES, remaining)))):
                remaining -= skipped
        return cast(BinaryIO, response)

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none. Raises StorageError."""
        try:
            with self._send(urllib.request.Request(self._address(name), method="HEAD")) as response:
                length = response.headers.get("Content-Length")
        except StorageError as error:
            if isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code in (404, 410):
                return None
            raise
        if length is None:
            raise StorageError(f"{self._address(name)}: the server does not say how long the file is.")
        return int(length)

    def _send(self, request: urllib.request.Request) -> Any:
        try:
            return urllib.request.urlopen(request, timeout=WEB_TIMEOUT)
        except urllib.error.HTTPError as error:
            raise StorageError(f"{request.full_url} cannot be read: {error.code} {error.reason}.") from error
        except OSError as error:
            raise StorageError(f"{request.full_url} cannot be read: {_reason(error)}.") from error

    def names(self) -> list[str]:
        """Raises StorageError: there is no standard way to list the files of a web server."""
        raise StorageError(f"{self._uri}: a web server does not list its files.")

    def write(self, name: str, content: bytes) -> None:
        """Raises StorageError."""
        raise StorageError(f"{self._uri} can only be read; {name} ({len(content)} bytes) was not written.")

    def publish(self, name: str, local: Path) -> None:
        """Raises StorageError."""
        raise StorageError(f"{self._uri} can only be read; {name} stays at {local}.")

    def remove(self, name: str) -> None:
        """Raises StorageError."""
        raise StorageError(f"{self._uri} can only be read; {name} was not removed.")


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error)
