"""Preparation here and on a Ray cluster: the same bytes as by one thread, whichever process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from typer.testing import CliRunner

from soflow_core.failures import InputError
from soflow_pipelines.preparation.build import prepare_locally
from soflow_pipelines.preparation.state import begin
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.shards.verify import verify
from soflow_pipelines.storage.opening import open_storage
from soflow_platform.cli.data import app
from soflow_platform.cluster.actor_pool import Progress, share_cluster
from soflow_platform.cluster.connection import RAY_START_SECONDS, Cluster
from soflow_platform.errors import JobError
from soflow_platform.jobs import prepare_here
from soflow_platform.jobs.prepare import PrepareRequest, make_plan, prepare
from soflow_platform.jobs.prepare_here import LONGEST_SECONDS, longest_here

SECONDS = 120


def write_images(folder: Path, count: int, side: int = 48, kind: str = "png") -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    for number in range(count):
        path = folder / "train" / f"class{number % 5}" / f"{number:04d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels + np.uint8(number)).save(path)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def request_for(images: Path, out: Path, **settings: object) -> PrepareRequest:
    return PrepareRequest(source=str(images), out=str(out), **{"resolution": 32, "batch": 4, **settings})  # type: ignore[arg-type]


def expected(request: PrepareRequest, folder: Path) -> dict[str, bytes]:
    prepare_locally(make_plan(request), open_storage(folder), None)
    return contents(folder)


def leave_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has this process leave every shard, as one does that has observed that it would take too long."""
    monkeypatch.setattr(prepare_here, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(prepare_here, "longest_here", lambda *_: 0.0)


@pytest.mark.parametrize("on_ray", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_bytes_are_those_of_one_thread_and_nothing_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_ray: bool
) -> None:
    request = request_for(write_images(tmp_path / "images", 80), tmp_path / "out")
    seen: list[Progress] = []
    if on_ray:
        leave_to_ray(monkeypatch)
    else:
        monkeypatch.setattr("soflow_platform.jobs.prepare.connected", None)
    first = prepare(request, report=seen.append)
    assert (first.built, first.info.samples) == (8, 80)
    assert contents(tmp_path / "out") == expected(request, tmp_path / "here")
    assert seen[-1] == Progress(80, 80)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    again = prepare(request)
    assert (again.built, again.info) == (0, first.info)


def test_what_would_take_long_is_left_whole_and_the_next_command_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(write_images(tmp_path / "images", 80), tmp_path / "out")
    plan, store = make_plan(request), open_storage(request.out)
    pending = begin(plan, store)
    assert pending is not None
    with monkeypatch.context() as patched:
        leave_to_ray(patched)
        patched.setattr(prepare_here, "POLL_SECONDS", 0.0)
        result = prepare_here.build_here(plan, store, None, pending, lambda _: None)
    built = [shard for shard in pending if shard not in result.left]
    assert result.left
    assert begin(plan, store) == result.left
    assert len(list((tmp_path / "out").glob("shard-*.tar"))) == len(built)
    assert prepare(request).built == len(result.left)
    assert contents(tmp_path / "out") == expected(request, tmp_path / "here")


def test_a_ray_is_started_only_where_its_cores_make_up_for_its_start() -> None:
    assert longest_here(2, 2) == LONGEST_SECONDS
    assert longest_here(64, 4) < 1.1 * RAY_START_SECONDS
    # 16 cores: after t s on 4 threads a Ray would have ended in its start and t / 4.
    t = longest_here(16, 4)
    assert t == pytest.approx(RAY_START_SECONDS + t / 4)


def test_damaged_images_of_all_shards_are_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 40)
    damaged = [images / "train" / "class1" / "0001.png", images / "train" / "class4" / "0034.png"]
    whole = [path.read_bytes() for path in damaged]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:100])
    request = request_for(images, tmp_path / "out")
    with pytest.raises(
        JobError, match=r"2 images cannot be used.*\n.*class1/0001\.png.*\n.*class4/0034\.png"
    ):
        prepare(request)
    finished = len(list((tmp_path / "out").glob("shard-*.tar")))
    assert 6 <= finished < 8
    for path, content in zip(damaged, whole, strict=True):
        path.write_bytes(content)
    # The list of names and sizes is as it would have been, but the sizes were others when the work began.
    with pytest.raises(InputError, match="source_digest"):
        prepare(request)


def start_driver(request: PrepareRequest, log: Path, on_ray: bool = True) -> subprocess.Popen[bytes]:
    code = (
        "from soflow_pipelines.images.limits import ImageLimits\n"
        "from soflow_pipelines.sources.opening import SourceOptions\n"
        "from soflow_platform.jobs.prepare import PrepareRequest, prepare\n"
        "from soflow_platform.jobs import prepare_here\n"
        f"prepare_here.LOOK_SECONDS = {0.0 if on_ray else 600.0}\n"
        f"prepare_here.longest_here = lambda *_: {0.0 if on_ray else 600.0}\n"
        f"prepare({request!r})"
    )
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=file, stderr=file, start_new_session=True
        )


def wait_for(condition, driver: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert driver.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < until, log.read_text()[-2000:]
        time.sleep(0.05)


def builders_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of the builder actors that a driver started."""
    children = psutil.Process(driver.pid).children(recursive=True)
    builders = [child for child in children if "PoolActor" in " ".join(child.cmdline())]
    assert builders
    return builders


@pytest.mark.faults
@pytest.mark.parametrize("on_ray", [False, True])
def test_a_killed_driver_and_the_same_command_end_with_the_same_bytes(tmp_path: Path, on_ray: bool) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    request = request_for(write_images(tmp_path / "images", 160, side=1000, kind="bmp"), out)
    driver = start_driver(request, log, on_ray)
    records = out / ".preparing"
    wait_for(lambda: len(list(records.glob("*.tar.parquet"))) >= 2, driver, log)
    builders = builders_of(driver) if on_ray else []
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (out / "dataset.json").exists()
    # Builders outlive the driver for a moment and may finish their shards.
    _, alive = psutil.wait_procs(builders, timeout=SECONDS)
    assert not alive
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.tar")}
    recorded = {path.name.removesuffix(".parquet") for path in records.glob("*.tar.parquet")}
    assert 2 <= len(recorded) < 8
    done = prepare(request)
    assert done.built == 8 - len(recorded)
    assert contents(out) == expected(request, tmp_path / "here")
    for name in recorded:
        assert (out / name).stat().st_mtime_ns == kept[name]
    assert verify(out) == []


@pytest.mark.faults
def test_a_killed_worker_costs_its_shard_alone(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    request = request_for(write_images(tmp_path / "images", 160, side=1000, kind="bmp"), out)
    driver = start_driver(request, log)
    wait_for(lambda: list((out / ".preparing").glob("*.tar.parquet")), driver, log)
    builders_of(driver)[0].kill()
    assert driver.wait(timeout=SECONDS) == 0, log.read_text()[-2000:]
    assert contents(out) == expected(request, tmp_path / "here")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "/nowhere"}, "/nowhere does not exist"),
        ({"autoencoder": "./nowhere"}, "neither a folder here nor a hub id"),
        ({"out": "gopher://host/x"}, "gopher:// is not understood"),
        ({"out": "/proc/nowhere"}, "cannot be written"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    images = write_images(tmp_path / "images", 5)
    fields = {"source": str(images), "out": str(tmp_path / "out"), "resolution": 32, **settings}
    with pytest.raises(InputError, match=message):
        prepare(PrepareRequest(**fields))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_builder_gets_a_gpu_and_its_share_of_the_cores() -> None:
    machines = Cluster(address="x", local=False, cpus=32, gpus=4, nodes=2, machines=2)
    share = share_cluster(machines, tasks=100, uses_gpu=True)
    assert (share.actors, share.cpus, share.gpus, share.threads) == (4, 8, 1, 8)
    pixels = share_cluster(machines, tasks=100, uses_gpu=False)
    assert (pixels.actors, pixels.cpus, pixels.gpus) == (32, 1, 0)
    assert share_cluster(machines, tasks=3, uses_gpu=False).actors == 3


def test_inspect_and_verify_tell_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_locally(
        make_plan(request_for(write_images(tmp_path / "images", 20), out)), open_storage(out), None
    )
    runner = CliRunner()
    shown = runner.invoke(app, ["inspect", str(out), "--sheet", str(tmp_path / "sheet.png")])
    assert shown.exit_code == 0, shown.output
    assert "20 samples, 7 shards" in shown.output
    assert "5 classes of 4 to 4 samples" in shown.output
    assert Image.open(tmp_path / "sheet.png").size[0] > 4 * 32
    sound = runner.invoke(app, ["verify", str(out)])
    assert "20 samples in 7 shards are as they were written" in sound.output
    (out / "shard-000002.tar").write_bytes(b"")
    damaged = runner.invoke(app, ["verify", str(out)])
    assert isinstance(damaged.exception, JobError)
    assert "shard-000002.tar" in damaged.output
    absent = runner.invoke(app, ["verify", str(tmp_path / "nothing")])
    assert isinstance(absent.exception, InputError)
    assert read_info(out).samples == 20
