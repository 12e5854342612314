"""RayStatisticsRunner: jobs are merged as soon as their blocks are there, references of training data included."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from soflow_pipelines.features.network import FeatureNetwork
from soflow_pipelines.preparation.builtin import ensure_builtin
from soflow_pipelines.references.statistics_job import LocalStatistics, StatisticsJob
from soflow_pipelines.references.stored_images import StoredImages
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.digits import load_digits
from soflow_platform.cli.display import SweepDisplay
from soflow_platform.cluster.actor_pool import Progress
from soflow_platform.cluster.connection import Cluster, connected
from soflow_platform.config.evaluation import EvaluationConfig
from soflow_platform.config.validation import read_experiment
from soflow_platform.evaluation.block_store import MERGED
from soflow_platform.evaluation.evaluator import Evaluator
from soflow_platform.evaluation.feature_networks import feature_network
from soflow_platform.evaluation.runner import RayStatisticsRunner
from soflow_platform.storage.project import ProjectFolder
from tests.support.small_networks import exported

SWEEP_FILE = Path(__file__).parents[3] / "sweeps" / "digits.yaml"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with connected(None) as found:
        yield found


@pytest.fixture
def storage(tmp_path: Path, digits_files: Path) -> ProjectFolder:
    return ProjectFolder(Path(shutil.copytree(digits_files, tmp_path / "runs")))


def digits_file(path: Path, start: int, stop: int) -> StoredImages:
    np.savez(path, arr_0=load_digits().images[start:stop].transpose(0, 2, 3, 1))
    return StoredImages(str(path), f"digits-{start}-{stop}", stop - start)


def test_a_job_is_merged_as_soon_as_its_last_block_is_there(
    cluster: Cluster, storage: ProjectFolder, tmp_path: Path
) -> None:
    network = feature_network("digits-classifier", (1, 8, 8), storage)
    sets = [digits_file(tmp_path / f"{start}.npz", start, start + 800) for start in (0, 900)]
    jobs = [StatisticsJob(images, "digits-classifier", network.id, ("fd",)) for images in sets]
    seen: list[int] = []

    def look(progress: Progress) -> None:
        assert progress.done <= progress.total == 1600
        wholes = [runner.folder(job).folder / MERGED for job in jobs]
        merged = [whole for whole in wholes if whole.exists()]
        seen.append(len(merged))
        for whole in merged:
            assert [path.name for path in whole.parent.iterdir()] == [MERGED]

    runner = RayStatisticsRunner(storage, report=look, cluster=cluster)
    one, other = runner.statistics(jobs)
    assert set(seen) == {0, 1, 2}
    assert (one.count, other.count) == (800, 800)
    one.check_complete()


@pytest.mark.parametrize("features", ["pooled", "file"])
def test_the_training_datas_reference_is_computed_once_on_the_cluster(
    cluster: Cluster, storage: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: str
) -> None:
    monkeypatch.setattr("soflow_platform.evaluation.evaluator.QUICKLY_POOLED", 1000)
    data = str(ensure_builtin("digits", storage.data / "digits"))
    name = features if features == "pooled" else exported(tmp_path / "net", 1, 8)
    config = EvaluationConfig(every=1, samples=32, features=name)
    seen: list[Progress] = []
    runner = RayStatisticsRunner(storage, report=seen.append, cluster=cluster)
    computed = Evaluator.open(config, read_info(data), data, True, storage, runner.one)
    assert seen[-1] == Progress(1797, 1797)
    assert len({progress.done for progress in seen}) > 1
    assert computed.reference.count == 1797
    (kept,) = storage.features.glob("reference-*")
    written = os.stat(kept).st_mtime_ns
    # A worker of a trial finds it.
    found = Evaluator.open(config, read_info(data), data, True, storage)
    assert os.stat(kept).st_mtime_ns == written
    # And has the same numbers where it finds none.
    kept.unlink()
    alone = Evaluator.open(config, read_info(data), data, True, storage)
    for evaluator in (found, alone):
        assert evaluator.reference.moments is not None
        assert computed.reference.moments is not None
        assert np.array_equal(evaluator.reference.moments.mean, computed.reference.moments.mean)
        assert np.array_equal(evaluator.reference.moments.covariance, computed.reference.moments.covariance)


def test_without_a_terminal_lines_say_how_many_real_images_are_described(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("soflow_platform.cli.display.NEWS_SECONDS", 0)
    written = io.StringIO()
    display = SweepDisplay(Console(file=written, width=100), read_experiment(SWEEP_FILE, ())[0], [])
    with display.describing() as report:
        report(Progress(640, 50_000))
    assert written.getvalue().endswith("640 of 50,000 real images described\n")


def whole(job: StatisticsJob, network: FeatureNetwork) -> dict[str, Any]:
    return LocalStatistics(network)(job).state()


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_small_job_is_done_before_ray_could_start(storage: ProjectFolder, tmp_path: Path) -> None:
    network = feature_network("digits-classifier", (1, 8, 8), storage)
    job = StatisticsJob(digits_file(tmp_path / "a.npz", 0, 200), "digits-classifier", network.id, ("fd",))
    seen: list[Progress] = []
    with RayStatisticsRunner(storage, report=seen.append) as runner:
        here = runner.one(job)
        assert runner._cluster is None
    assert seen[-1] == Progress(200, 200)
    assert_equal(here.state(), whole(job, network))


def test_what_this_process_leaves_is_done_by_ray(
    cluster: Cluster, storage: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = feature_network("digits-classifier", (1, 8, 8), storage)
    job = StatisticsJob(digits_file(tmp_path / "a.npz", 0, 1600), "digits-classifier", network.id, ("fd",))
    monkeypatch.setattr("soflow_platform.evaluation.runner.RAY_START_SECONDS", 0.05)
    monkeypatch.setattr("soflow_platform.evaluation.runner.connected", lambda _: nullcontext(cluster))
    seen: list[Progress] = []
    with RayStatisticsRunner(storage, report=seen.append) as runner:
        together = runner.one(job)
        assert runner._cluster is cluster
    assert seen[-1] == Progress(1600, 1600)
    assert_equal(together.state(), whole(job, network))
