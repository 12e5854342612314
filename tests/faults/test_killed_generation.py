"""A generation whose driver or worker is killed, or whose disk is full, is finished by the same command: no image twice, none missing,
the same bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from soflow_platform.generation.finished_set import verify
from tests.support.generators import digests, make_set, save_digits_generator
from tests.support.small_disks import mounted

pytestmark = pytest.mark.faults
SECONDS = 240
IMAGES, STEPS = 4096, 60
PARTS = 8


def start(
    model: Path,
    out: Path,
    log: Path,
    steps: int = STEPS,
    kind: str = "webdataset",
    workers: int = 2,
    address: str | None = None,
) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "soflow_platform.cli.main", "generate", "--model", str(model)),
        *("--out", str(out), "--num", str(IMAGES), "--steps", str(steps), "--format", kind),
        *("--workers", str(workers), "--json"),
        *(() if address is None else ("--address", address)),
    ]
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=model.parent, start_new_session=True
        )


def finished(process: subprocess.Popen[str], log: Path) -> Any:
    printed, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, log.read_text()[-2000:]
    return json.loads(printed)


def records(out: Path) -> list[Path]:
    return sorted((out / "_parts").glob("part-*.parquet"))


def until_parts(out: Path, process: subprocess.Popen[str], log: Path, count: int = 2) -> None:
    end = time.monotonic() + SECONDS
    while len(records(out)) < count:
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < end
        time.sleep(0.05)


def assert_whole(
    model: Path, out: Path, tmp_path: Path, steps: int = STEPS, kind: str = "webdataset"
) -> None:
    assert verify(str(out)) == (IMAGES, [])
    assert pq.read_table(out / "manifest.parquet")["index"].to_pylist() == list(range(IMAGES))
    make_set(model, tmp_path / "uncut", num=IMAGES, steps=steps, format=kind)
    assert digests(out) == digests(tmp_path / "uncut")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_digits_generator(tmp_path / "ema.safetensors", heavy=True)


def test_a_killed_driver_is_finished_by_the_same_command(model: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    cut = start(model, out, log)
    until_parts(out, cut, log)
    everyone = psutil.Process(cut.pid).children(recursive=True)
    cut.kill()
    psutil.wait_procs(everyone, timeout=60)
    cut.communicate()
    made = {path: path.stat().st_mtime_ns for path in records(out)}
    assert 2 <= len(made) < PARTS
    done = finished(start(model, out, log), log)
    assert done["kept"] == len(made) * IMAGES // PARTS
    assert done["made"] + done["kept"] == IMAGES
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert list((out / "_parts").glob(".*.part")) == []
    assert_whole(model, out, tmp_path)


def test_a_killed_worker_costs_its_part_alone(model: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    driver = start(model, out, log)
    until_parts(out, driver, log, 1)
    everyone = psutil.Process(driver.pid).children(recursive=True)
    workers = [child for child in everyone if "PoolActor" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    assert finished(driver, log)["made"] == IMAGES
    assert_whole(model, out, tmp_path)


def pool_actors(process: psutil.Process) -> list[psutil.Process]:
    """The processes of a pool's actors below one of Ray's."""
    return [child for child in process.children(recursive=True) if "PoolActor" in " ".join(child.cmdline())]


def test_a_killed_node_costs_its_part_alone_also_where_no_other_node_comes(
    cluster: Any, model: Path, tmp_path: Path
) -> None:
    """The place of the lost actor is gone with its node: its part is made where another actor has ended."""
    raylets = [
        psutil.Process(node.all_processes["raylet"][0].process.pid)
        for node in (cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1))
    ]
    out, log = tmp_path / "out", tmp_path / "log"
    driver = start(model, out, log, address=str(cluster.address))
    until_parts(out, driver, log, 2)
    assert [len(pool_actors(raylet)) for raylet in raylets] == [1, 1]
    everyone = [raylets[1], *raylets[1].children(recursive=True)]
    before = len(records(out))
    assert before < PARTS
    raylets[1].kill()
    psutil.wait_procs(everyone, timeout=60)
    done = finished(driver, log)
    assert (done["made"], done["kept"]) == (IMAGES, 0)
    assert_whole(model, out, tmp_path)


@pytest.mark.parametrize(("kind", "workers"), [("webdataset", 1), ("webdataset", 2), ("png", 1), ("npz", 1)])
def test_a_full_disk_is_said_and_the_same_command_goes_on(
    model: Path, tmp_path: Path, kind: str, workers: int
) -> None:
    log = tmp_path / "log"
    with mounted(tmp_path / "disk", mebibytes=64) as disk:
        out, ballast = disk / "out", disk / "ballast"
        # Half of what samples.npz takes, and less than the other sets.
        ballast.write_bytes(bytes(64 * 2**20 - IMAGES * 192 // 2))
        cut = start(model, out, log, 1, kind, workers)
        printed, _ = cut.communicate(timeout=SECONDS)
        assert (cut.returncode, printed) == (1, "")
        last = log.read_text().splitlines()[-1]
        assert last.startswith(f"soflowctl: failed: {out}")
        assert last.endswith(
            "cannot be written: No space left on device; the same command goes on once that is mended."
        )
        assert not (out / "manifest.parquet").exists()
        ballast.unlink()
        done = finished(start(model, out, log, 1, kind, workers), log)
        assert done["made"] + done["kept"] == IMAGES
        assert_whole(model, out, tmp_path, 1, kind)
        assert list((out / "_parts").glob(".*.part")) == []
