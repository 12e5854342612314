"""A prefix of an S3 bucket as an object store, through pyarrow's S3 client."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qs

from soflow_core.failures import printable, summarize
from soflow_pipelines.storage.object_store import LocationError, StorageError
from soflow_pipelines.storage.uris import parse_uri, without_secrets

UPLOAD_BYTES = 8 * 2**20


class S3Folder:
    """`s3://bucket/prefix[?endpoint_override=HOST:PORT&scheme=http&region=NAME]`.

    Credentials are taken from where AWS's own tools take them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,
    ~/.aws, the instance's role); the address of a server other than AWS from the query or AWS_ENDPOINT_URL.
    Keys in the URI are refused, because URIs are logged. Raises LocationError.
    """

    def __init__(self, uri: str) -> None:
        parts = parse_uri(uri)
        if "@" in parts.netloc:
            raise LocationError("s3:// URIs hold no keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
        if not parts.netloc:
            raise LocationError(f"{without_secrets(uri)} names no bucket; write s3://bucket/prefix.")
        self._uri = uri
        self._options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        unknown = set(self._options) - {"endpoint_override", "scheme", "region"}
        if unknown:
            raise LocationError(
                f"{without_secrets(uri)}: the option {printable(sorted(unknown)[0])!r} is not known."
            )
        if self._options.get("scheme", "https") not in ("http", "https"):
            raise LocationError(f"{without_secrets(uri)}: the scheme is http or https.")
        self._root = f"{parts.netloc}/{parts.path.strip('/')}".rstrip("/")
        self._opened: tuple[int, Any] | None = None

    @property
    def uri(self) -> str:
        """The URI that the store was opened with."""
        return self._uri

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def _filesystem(self) -> Any:
        # The client holds threads and sockets, which do not survive a fork.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self._connect())
        return self._opened[1]

    def _connect(self) -> Any:
        from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        scheme, _, host = endpoint.rpartition("://")
        settings = {
            "endpoint_override": self._options.get("endpoint_override", host) or None,
            "scheme": self._options.get("scheme", scheme) or "https",
            "region": self._options.get("region")
            or os.environ.get("AWS_REGION")
            or os.environ.get("AWS_DEFAULT_REGION"),
        }
        if settings["endpoint_override"] and not settings["region"]:
            settings["region"] = "us-east-1"
        return S3FileSystem(
            **settings,
            connect_timeout=10,
            request_timeout=10,  # seconds without a byte
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=2),
            allow_bucket_creation=False,
        )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def read(self, name: str) -> bytes:
        """The content of a file. Raises StorageError."""
        with self.open(name) as file:
            try:
                return file.read()
            except OSError as error:
                raise self._failure(name, "read", error) from error

    def open(self, name: str, start: int = 0) -> BinaryIO:
        """Opens a file for reading, from the byte `start` on. Raises StorageError."""
        try:
            file = self._filesystem.open_input_file(self._path(name))
            file.seek(start)
        except OSError as error:
            raise self._failure(name, "read", error) from error
        return cast(BinaryIO, file)

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none. Raises StorageError."""
        from pyarrow.fs import FileType

        try:
            info = self._filesystem.get_file_info(self._path(name))
        except OSError as error:
            raise self._failure(name, "read", error) from error
        return int(info.size) if info.type == FileType.File else None

    def names(self) -> list[str]:
        """The names of all files, sorted. Raises StorageError."""
        from pyarrow.fs import FileSelector, FileType

        try:
            entries = self._filesystem.get_file_info(
                FileSelector(self._root, recursive=True, allow_not_found=True)
            )
        except OSError as error:
            raise self._failure("", "listed", error) from error
        return sorted(entry.path[len(self._root) + 1 :] for entry in entries if entry.type == FileType.File)

    def write(self, name: str, content: bytes) -> None:
        """Uploads a file. Raises StorageError."""
        self._upload(name, content)

    def publish(self, name: str, local: Path) -> None:
        """Uploads a finished local file, then removes it. Raises StorageError."""
        self._upload(name, local)
        local.unlink()

    def _upload(self, name: str, content: bytes | Path) -> None:
        expected = 0
        try:
            with self._filesystem.open_output_stream(self._path(name)) as target:
                for chunk in _chunks(content):
                    target.write(chunk)
                    expected += len(chunk)
        except OSError as error:
            raise self._failure(name, "written", error) from error
        # An upload that failed while it was being closed has been seen to raise nothing.
        arrived = self.size(name)
        if arrived != expected:
            raise StorageError(f"{self._uri}/{name}: {expected} bytes were sent, {arrived} arrived.")

    def remove(self, name: str) -> None:
        """Removes a file, where there is one. Raises StorageError."""
        try:
            if self.size(name) is not None:
                self._filesystem.delete_file(self._path(name))
        except OSError as error:
            raise self._failure(name, "removed", error) from error

    def _failure(self, name: str, what: str, error: OSError) -> StorageError:
        place = f"{self._uri.partition('?')[0].rstrip('/')}/{name}".rstrip("/")
        return StorageError(f"{place} cannot be {what}: {_s3_reason(error)}")


def _chunks(content: bytes | Path) -> Any:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while chunk := file.read(UPLOAD_BYTES):
            yield chunk


def _s3_reason(error: OSError) -> str:
    """The cause of an error of the AWS client, as the end of a sentence."""
    text = str(error)
    status = re.search(r"HTTP status (\d+)", text)
    if "NO_SUCH_BUCKET" in text or "NoSuchBucket" in text:
        return "there is no such bucket."
    if (status and status[1] in ("401", "403")) or "ACCESS_DENIED" in text or "SIGNATURE" in text.upper():
        return "the server refuses the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)."
    if "NETWORK_CONNECTION" in text or "curlCode" in text:
        curl = re.search(r"curlCode: \d+, ([^:]+)", text)
        return f"the connection failed ({curl[1] if curl else 'no answer'})."
    if "NO_SUCH_KEY" in text or "NOT_FOUND" in text or "not found" in text.lower() or "404" in text:
        return "there is no such file."
    return f"{summarize(error)}."
