"""Sets in object storage hold the bytes of those in a folder, also where the storage was away for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from soflow_pipelines.storage.opening import open_storage
from soflow_platform.generation.finished_set import verify
from tests.support.generators import digests, make_set, save_digits_generator
from tests.support.object_store import S3Server, Wire, serving, set_credentials, uri

OUTAGE_SECONDS = 30


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serving(tmp_path_factory.mktemp("s3") / "data", "sets") as running:
        yield running


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    set_credentials(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_digits_generator(tmp_path_factory.mktemp("model") / "ema.safetensors")


def downloaded(remote: str, folder: Path) -> Path:
    store = open_storage(remote)
    for name in store.names():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.read(name))
    return folder


@pytest.mark.parametrize("kind", ["png", "webdataset", "npz"])
def test_a_set_in_s3_has_the_bytes_of_one_in_a_folder(
    server: S3Server, model: Path, tmp_path: Path, kind: str
) -> None:
    remote = uri(server.port, f"sets/{kind}")
    make_set(model, remote, num=70, format=kind)
    make_set(model, tmp_path / "here", num=70, format=kind)
    assert digests(downloaded(remote, tmp_path / "there")) == digests(tmp_path / "here")
    assert verify(remote) == (70, [])
    file = next(name for name in open_storage(remote).names() if not name.endswith((".json", ".parquet")))
    open_storage(remote).remove(file)
    assert verify(remote)[1]
    make_set(model, remote, num=70, format=kind)
    assert verify(remote) == (70, [])


@pytest.mark.faults
def test_a_set_is_finished_though_s3_was_away(server: S3Server, model: Path, tmp_path: Path) -> None:
    wire = Wire(server.port)
    remote, direct = uri(wire.port, "sets/outage"), open_storage(uri(server.port, "sets/outage"))
    ends = []

    def cut() -> None:
        while not any(name.endswith(".tar") for name in direct.names()):
            time.sleep(0.02)
        wire.stalled = True
        time.sleep(OUTAGE_SECONDS)
        wire.stalled = False
        ends.append(len([name for name in direct.names() if name.endswith(".tar")]))

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        make_set(model, remote, num=2000, format="webdataset", steps=2)
    finally:
        cutter.join()
        wire.close()
    assert ends[0] < 8
    make_set(model, tmp_path / "here", num=2000, format="webdataset", steps=2)
    assert digests(downloaded(direct.uri, tmp_path / "there")) == digests(tmp_path / "here")
