"""Shard sets in S3 and behind a web server: read, written, cut, slow, refused."""

import functools
import http.server
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from soflow_pipelines.preparation.build import prepare_locally
from soflow_pipelines.preparation.shard_plan import PrepareSettings, ShardPlan
from soflow_pipelines.shards.cache import ShardCache
from soflow_pipelines.shards.info import DatasetInfo, ShardError
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.tables import read_info, read_manifest
from soflow_pipelines.shards.verify import verify
from soflow_pipelines.shards.writer import Sample, write_shards
from soflow_pipelines.sources.opening import open_source
from soflow_pipelines.storage.object_store import LocationError, StorageError
from soflow_pipelines.storage.opening import open_storage
from tests.support.object_store import (
    ACCESS_KEY,
    SECRET_KEY,
    S3Server,
    Wire,
    free_port,
    serving,
    set_credentials,
    uri,
)

LATENTS = DatasetInfo(kind="latents", shape=(4, 32, 32), dtype="float16", classes=10, scaling=0.5)


def latents(count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [Sample(f"{i:05d}", rng.random((8, 32, 32)).astype(np.float16), i % 10) for i in range(count)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serving(tmp_path_factory.mktemp("s3") / "data", "sets") as running:
        yield running


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    set_credentials(monkeypatch)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 latents in four shards of half a megabyte."""
    folder = tmp_path_factory.mktemp("local") / "set"
    write_shards(latents(120), folder, LATENTS, per_shard=30)
    return folder


@pytest.fixture(scope="module")
def uploaded(server: S3Server, local: Path) -> str:
    os.environ.setdefault("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    store = open_storage(uri(server.port, "sets/latents"))
    for path in local.iterdir():
        store.write(path.name, path.read_bytes())
    return "sets/latents"


@pytest.fixture
def wire(server: S3Server) -> Iterator[Wire]:
    relay = Wire(server.port)
    yield relay
    relay.close()


def assert_reads_like(remote: str, local: Path, cache: ShardCache, steps: int = 4) -> None:
    with ShardLoader(remote, 48, seed=2, cache=cache) as far, ShardLoader(local, 48, seed=2) as near:
        for _ in range(steps):
            there, here = next(far), next(near)
            assert torch.equal(there.x0, here.x0)
            assert torch.equal(there.positions, here.positions)


def test_a_set_in_s3_reads_as_the_same_set_on_disk(
    server: S3Server, uploaded: str, local: Path, tmp_path: Path
) -> None:
    assert_reads_like(uri(server.port, uploaded), local, ShardCache(tmp_path, 10**9))


def test_the_endpoint_may_come_from_the_environment(
    server: S3Server, uploaded: str, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    assert read_info(f"s3://{uploaded}") == read_info(local)


def test_a_second_loader_reads_from_the_cache_with_the_server_gone(
    wire: Wire, uploaded: str, local: Path, tmp_path: Path
) -> None:
    place = uri(wire.port, uploaded)
    cache = ShardCache(tmp_path, 10**9)
    assert_reads_like(place, local, cache)
    with ShardLoader(place, 48, seed=2, cache=cache) as loader, ShardLoader(local, 48, seed=2) as near:
        wire.cut_after = 0
        wire.close()
        for _ in range(5):
            assert torch.equal(next(loader).x0, next(near).x0)


def test_wrong_credentials_are_named(
    server: S3Server, uploaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(StorageError, match=r"s3://sets/latents/dataset\.json.*refuses the credentials"):
        read_info(uri(server.port, uploaded))


def test_a_bucket_and_a_set_that_are_not_there_are_named(server: S3Server) -> None:
    with pytest.raises(ShardError, match="holds no shard set"):
        read_info(uri(server.port, "sets/nothing"))
    with pytest.raises((StorageError, ShardError), match="s3://no-such-bucket"):
        read_info(uri(server.port, "no-such-bucket/x"))


def test_a_server_that_does_not_answer_is_named_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(
        StorageError, match=r"s3://sets/x/dataset\.json cannot be read: the connection failed"
    ):
        read_info(uri(free_port(), "sets/x"))
    assert time.monotonic() - started < 30


def test_a_connection_that_is_cut_now_and_then_loses_nothing(
    wire: Wire, uploaded: str, local: Path, tmp_path: Path
) -> None:
    place = uri(wire.port, uploaded)
    cache = ShardCache(tmp_path, 10**9)
    with ShardLoader(place, 48, seed=2, cache=cache) as far, ShardLoader(local, 48, seed=2) as near:
        wire.cut_after, wire.max_cuts = 200_000, 6
        for _ in range(5):
            assert torch.equal(next(far).x0, next(near).x0)
    assert wire.cuts == 6


@pytest.mark.slow
def test_a_connection_that_is_always_cut_is_named_with_the_shard(
    wire: Wire, uploaded: str, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path, 10**9)
    with ShardLoader(uri(wire.port, uploaded), 48, cache=cache, threads=0) as loader:
        wire.cut_after = 0
        with pytest.raises(StorageError, match=r"shard-00000\d\.tar could not be fetched, 0 of \d+ bytes"):
            next(loader)
    assert not list(tmp_path.glob("*.part"))


def test_a_slow_server_is_waited_for(wire: Wire, uploaded: str, local: Path, tmp_path: Path) -> None:
    place = uri(wire.port, uploaded)
    wire.rate = 200_000  # of each connection; four are open at once
    started = time.monotonic()
    assert_reads_like(place, local, ShardCache(tmp_path, 10**9), steps=3)
    assert time.monotonic() - started > 2


@pytest.mark.slow
def test_a_server_that_stalls_is_given_up(wire: Wire, uploaded: str, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10**9)
    store = open_storage(uri(wire.port, uploaded))
    record = read_manifest(store.uri)[0]
    wire.stalled = True
    started = time.monotonic()
    with pytest.raises(StorageError, match="could not be fetched"):
        cache.fetch(store, record)
    assert time.monotonic() - started < 200


def test_a_shard_that_was_changed_in_s3_is_not_taken(server: S3Server, local: Path, tmp_path: Path) -> None:
    store = open_storage(uri(server.port, "sets/changed"))
    for path in local.iterdir():
        store.write(path.name, path.read_bytes())
    content = bytearray((local / "shard-000002.tar").read_bytes())
    content[5000] ^= 1
    store.write("shard-000002.tar", bytes(content))
    with (
        ShardLoader(store.uri, 120, cache=ShardCache(tmp_path, 10**9)) as loader,
        pytest.raises(ShardError, match=r"shard-000002\.tar has not the bytes"),
    ):
        next(loader)
    assert str(verify(store.uri)[0]).startswith("shard-000002.tar, sample")


def test_two_sets_with_shards_of_one_name_share_a_cache(
    server: S3Server, uploaded: str, local: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write_shards(latents(120)[::-1], other, LATENTS, per_shard=30)
    store = open_storage(uri(server.port, "sets/other"))
    for path in other.iterdir():
        store.write(path.name, path.read_bytes())
    cache = ShardCache(tmp_path / "cache", 10**9)
    assert_reads_like(uri(server.port, uploaded), local, cache)
    assert_reads_like(store.uri, other, cache)


def test_shards_prepared_into_s3_are_those_prepared_on_disk(server: S3Server, tmp_path: Path) -> None:
    plan = ShardPlan(open_source("digits"), PrepareSettings(8))
    far = open_storage(uri(server.port, "sets/digits"))
    near = open_storage(tmp_path / "digits")
    assert prepare_locally(plan, far, None) == prepare_locally(plan, near, None)
    assert far.names() == near.names()
    for name in far.names():
        assert far.read(name) == near.read(name)
    assert verify(far.uri) == []


def test_keys_in_a_uri_and_unknown_options_are_refused() -> None:
    with pytest.raises(LocationError, match="hold no keys"):
        open_storage("s3://user:secret@bucket/x")
    with pytest.raises(LocationError, match="'endpont' is not known"):
        open_storage("s3://bucket/x?endpont=1")
    with pytest.raises(LocationError, match="gopher://"):
        open_storage("gopher://host/x")


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """A folder with range requests, which the standard handler does not know."""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path.partition("?")[0]))
        if not wanted or not path.is_file():
            super().do_GET()
            return
        content = path.read_bytes()[int(wanted.removeprefix("bytes=").rstrip("-")) :]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *parts: object) -> None:
        """Nothing: the test's output is what is read."""


@pytest.fixture
def website(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The set behind https on loopback, with a certificate of its own that the client trusts."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subprocess.run([*made, "-keyout", key, "-out", certificate, *subject], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    handler = functools.partial(RangeHandler, directory=str(local))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd.server_address[1]
    httpd.shutdown()
    httpd.server_close()


def test_a_set_behind_https_reads_as_the_same_set_on_disk(website: int, local: Path, tmp_path: Path) -> None:
    place = f"https://localhost:{website}"
    assert_reads_like(place, local, ShardCache(tmp_path / "cache", 10**9))
    assert verify(place) == []
    with pytest.raises(StorageError, match="can only be read"):
        open_storage(place).write("x", b"")


def test_a_cut_web_connection_goes_on_where_it_stopped(website: int, local: Path, tmp_path: Path) -> None:
    relay = Wire(website)
    place = f"https://127.0.0.1:{relay.port}"
    with (
        ShardLoader(place, 48, seed=2, cache=ShardCache(tmp_path / "cache", 10**9)) as far,
        ShardLoader(local, 48, seed=2) as near,
    ):
        relay.cut_after, relay.max_cuts = 300_000, 4
        for _ in range(4):
            assert torch.equal(next(far).x0, next(near).x0)
    assert relay.cuts == 4
    relay.close()


def test_a_web_address_without_a_set_and_one_without_trust_are_named(
    website: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ShardError, match="holds no shard set"):
        read_info(f"https://localhost:{website}/elsewhere")
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(StorageError, match="certificate"):
        read_info(f"https://localhost:{website}")
