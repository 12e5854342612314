"""A folder of a web server as an object store that can be read but neither listed nor written."""

from __future__ import annotations

import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote, urlunsplit

from soflow_core.failures import printable
from soflow_pipelines.storage.object_store import LocationError, StorageError
from soflow_pipelines.storage.uris import parse_uri, without_secrets

WEB_TIMEOUT = 30.0
"""Seconds without a byte after which a connection is given up."""
SKIP_BYTES = 8 * 2**20


class WebFolder:
    """`https://host/path` (or http): files are read by name, with range requests.

    Passwords and queries are refused, because URIs are logged. Raises LocationError.
    """

    def __init__(self, uri: str) -> None:
        self._parts = parse_uri(uri)
        if "@" in self._parts.netloc:
            raise LocationError(
                f"{without_secrets(uri)}: a password in a URI would be shown and kept in logs: serve the set without one, or from "
                "s3://."
            )
        if self._parts.query or self._parts.fragment:
            raise LocationError(
                f"{without_secrets(uri)}: what follows ? or # would be shown and kept in logs, and is not sent: name the folder alone."
            )
        if not self._parts.hostname:
            raise LocationError(f"{without_secrets(uri)} names no host; write https://host/path.")
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
        if not length.isascii() or not length.isdigit() or len(length) > 18:
            raise StorageError(
                f"{self._address(name)}: the server says that the file has {printable(length)!r} bytes."
            )
        return int(length)

    def _send(self, request: urllib.request.Request) -> Any:
        try:
            return urllib.request.urlopen(request, timeout=WEB_TIMEOUT)
        except urllib.error.HTTPError as error:
            raise StorageError(
                f"{request.full_url} cannot be read: {error.code} {printable(error.reason)}."
            ) from error
        except (OSError, HTTPException, ValueError) as error:
            raise StorageError(f"{request.full_url} cannot be read: {printable(_reason(error))}.") from error

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


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
