"""From a sweep file to a registered model and images from it, at reduced size."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TRIAL_TAG, Tracking, TrackingStore
from soflow_platform.tuning.record import SweepRecord, all_records
from tests.support.commands import REDUCED, Run


@pytest.fixture(scope="module")
def swept(soflowctl: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[ProjectFolder, str]:
    """A finished sweep of four trials, and what the command printed."""
    root = tmp_path_factory.mktemp("digits") / "runs"
    done = soflowctl("run", "sweeps/digits.yaml", "--storage", str(root), *REDUCED)
    assert done.returncode == 0, done.stderr
    return ProjectFolder(root), done.stdout


@pytest.fixture(scope="module")
def record(swept: tuple[ProjectFolder, str]) -> SweepRecord:
    (only,) = all_records(swept[0])
    return only


@pytest.fixture(scope="module")
def parent(swept: tuple[ProjectFolder, str], record: SweepRecord) -> Any:
    return TrackingStore(swept[0].tracking_uri).client.get_run(record.run or "")


def test_the_terminal_ends_with_the_result_and_the_next_command(
    swept: tuple[ProjectFolder, str], record: SweepRecord
) -> None:
    storage, printed = swept
    assert record.best is not None
    assert f"best trial  {record.best.trial}, step {record.best.step}" in printed
    assert "eval/fd_nfe1" in printed
    assert "eval/label_agreement_nfe2" in printed
    assert f"soflowctl promote models:/digits@candidate --storage {storage.root}" in printed
    assert "http://127.0.0.1:5000/#/experiments/" in printed
    for grid in record.best.grids:
        assert grid in printed
        assert Image.open(grid).size[0] > 16


def test_every_trial_is_a_child_run_with_params_metrics_grids_and_tags(
    swept: tuple[ProjectFolder, str], record: SweepRecord, parent: Any
) -> None:
    storage, _ = swept
    tracking = Tracking(TrackingStore(storage.tracking_uri), parent.info.experiment_id)
    assert parent.info.status == "FINISHED"
    children = tracking.children(record.run or "")
    assert sorted(run.data.tags[TRIAL_TAG] for run in children) == [trial.name for trial in record.trials]
    names = ["p=0.5 r0=0.1 #00", "p=0.5 r0=0.5 #01", "p=1 r0=0.1 #02", "p=1 r0=0.5 #03"]
    assert sorted(run.info.run_name for run in children) == names
    assert len(children) == 4
    for run in children:
        assert run.info.status == "FINISHED"
        assert run.data.params["objective.times.start.mean"] == "0.2"
        assert run.data.tags["method"] == "soflow"
        assert run.data.tags["data.digest"].startswith("sha256:")
        assert [d.dataset.name for d in run.inputs.dataset_inputs] == ["digits"]
        assert run.data.tags["eval.features"].startswith("digits-cnn-1-")
        for metric in ("eval/fd_nfe1", "eval/fd_nfe2", "eval/label_agreement_nfe1"):
            history = tracking.client.get_metric_history(run.info.run_id, metric)
            assert [m.step for m in history] == [10, 20, 30, 40]
        steps = [m.step for m in tracking.client.get_metric_history(run.info.run_id, "train/loss")]
        assert steps == [1, *range(5, 41, 5)]
        images = [Path(f.path).name for f in tracking.client.list_artifacts(run.info.run_id, "images")]
        assert len([name for name in images if name.endswith(".png")]) == 5 * 2


def test_trials_vary_a_loss_weight_and_a_time_schedule(
    swept: tuple[ProjectFolder, str], record: SweepRecord, parent: Any
) -> None:
    tracking = Tracking(TrackingStore(swept[0].tracking_uri), parent.info.experiment_id)
    varied = {
        (run.data.params["objective.weight_power"], run.data.params["objective.schedule.initial"])
        for run in tracking.children(record.run or "")
    }
    assert varied == {("0.5", "0.1"), ("0.5", "0.5"), ("1.0", "0.1"), ("1.0", "0.5")}


def test_the_best_trial_is_the_one_with_the_lowest_distance_at_one_step(
    swept: tuple[ProjectFolder, str], record: SweepRecord, parent: Any
) -> None:
    client = TrackingStore(swept[0].tracking_uri).client
    tracking = Tracking(TrackingStore(swept[0].tracking_uri), parent.info.experiment_id)
    assert record.best is not None
    values = {
        (run.data.tags[TRIAL_TAG], m.step): m.value
        for run in tracking.children(record.run or "")
        for m in client.get_metric_history(run.info.run_id, "eval/fd_nfe1")
    }
    best = min(values, key=lambda key: values[key])
    assert (record.best.trial, record.best.step) == best
    assert record.best.metrics["eval/fd_nfe1"] == pytest.approx(values[best])
    assert parent.data.metrics["eval/fd_nfe1"] == pytest.approx(values[best])


def test_the_shards_can_be_read_by_webdataset(swept: tuple[ProjectFolder, str]) -> None:
    import webdataset

    shards = sorted(str(path) for path in (swept[0].data / "digits").glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert len(samples) == 1797
    assert samples[0]["npy"].shape == (1, 8, 8)
    assert {int(sample["cls"]) for sample in samples} == set(range(10))


def test_the_candidate_loads_with_mlflow_and_turns_labels_into_png_images(
    swept: tuple[ProjectFolder, str],
) -> None:
    import mlflow
    import pandas as pd

    mlflow.set_tracking_uri(swept[0].tracking_uri)
    mlflow.set_registry_uri(swept[0].tracking_uri)
    model = mlflow.pyfunc.load_model("models:/digits@candidate")
    labels = pd.DataFrame({"label": [3, 1, 4, 1, 5]})
    first = model.predict(labels, params={"seed": 7, "steps": 2})["png"].tolist()
    assert [Image.open(io.BytesIO(png)).size for png in first] == [(8, 8)] * 5
    assert len(set(first)) == 5
    assert model.predict(labels, params={"seed": 7, "steps": 2})["png"].tolist() == first
    assert model.predict(labels[:2], params={"seed": 7, "steps": 2})["png"].tolist() == first[:2]
    assert model.predict(labels, params={"seed": 8, "steps": 2})["png"].tolist() != first


def test_the_registered_weights_are_the_best_checkpoints_ema(
    swept: tuple[ProjectFolder, str], record: SweepRecord
) -> None:
    client = TrackingStore(swept[0].tracking_uri).client
    version = client.get_model_version_by_alias("digits", "candidate")
    assert record.best is not None
    assert version.tags["soflow.trial"] == record.best.trial
    assert float(version.tags["eval/fd_nfe1"]) == record.best.metrics["eval/fd_nfe1"]
    stored = list(swept[0].artifacts.glob("models/*/artifacts/artifacts/ema.safetensors"))
    assert len(stored) == 1
    assert stored[0].read_bytes() == (Path(record.best.checkpoint or "") / "ema.safetensors").read_bytes()
    assert not list(swept[0].artifacts.glob("models/**/*.pkl"))


def test_the_same_command_again_shows_the_result_and_changes_nothing(
    swept: tuple[ProjectFolder, str], soflowctl: Run
) -> None:
    storage, _ = swept
    again = soflowctl("run", "sweeps/digits.yaml", "--storage", str(storage.root), *REDUCED)
    assert again.returncode == 0, again.stderr
    assert "is finished; --again runs it anew" in again.stdout
    assert "models:/digits@candidate (version 1)" in again.stdout
    assert len(all_records(storage)) == 1
    assert len(TrackingStore(storage.tracking_uri).client.search_model_versions("name = 'digits'")) == 1


@pytest.mark.slow
def test_promotion_then_images_from_the_champion(
    swept: tuple[ProjectFolder, str], soflowctl: Run, tmp_path: Path
) -> None:
    place = ("--storage", str(swept[0].root))
    early = soflowctl(
        "generate", "--model", "models:/digits@champion", "--out", str(tmp_path / "early"), *place
    )
    assert early.returncode == 2
    assert "no version with alias 'champion'; promote one with `soflowctl promote digits`" in early.stderr
    assert not (tmp_path / "early").exists()

    promoted = soflowctl("promote", "models:/digits@candidate", *place)
    assert promoted.returncode == 0, promoted.stderr
    assert "models:/digits@champion is version 1: first champion" in promoted.stdout
    twice = soflowctl("promote", "digits", *place)
    assert twice.returncode == 2
    assert "is the champion already" in twice.stderr

    out = tmp_path / "images"
    settings = (
        "--model",
        "models:/digits@champion",
        "--steps",
        "2",
        "--seed",
        "5",
        "--out",
        str(out),
        *place,
    )
    made = soflowctl("generate", "--num", "70", *settings)
    assert made.returncode == 0, made.stderr
    files = sorted(path.name for path in out.glob("*-label-*.png"))
    assert len(files) == 70
    assert files[13] == "000013-label-3.png"
    assert (out / "grid.png").is_file()
    manifest = json.loads((out / "generation.json").read_text())
    assert manifest["model"] == "models:/digits/1"

    before = {path.name: path.read_bytes() for path in out.glob("*-label-*.png")}
    for name in files[:30]:
        (out / name).unlink()
    rest = soflowctl("generate", "--num", "70", *settings)
    assert "30 images made, 40 were there" in rest.stdout
    assert {path.name: path.read_bytes() for path in out.glob("*-label-*.png")} == before

    other = soflowctl("generate", "--num", "70", *settings[:2], "--steps", "1", *settings[4:])
    assert other.returncode == 2
    assert "holds images made with other settings (steps 2, now 1)" in other.stderr


@pytest.mark.slow
def test_another_trial_is_scored_against_the_champion_on_ray(
    swept: tuple[ProjectFolder, str], record: SweepRecord, soflowctl: Run
) -> None:
    """Both under the same seeds; the exit code says what the gate decided, and a dry run changes nothing."""
    place = ("--storage", str(swept[0].root))
    client = TrackingStore(swept[0].tracking_uri).client
    if "champion" not in client.get_registered_model("digits").aliases:
        assert soflowctl("promote", "digits", *place).returncode == 0
    assert record.best is not None
    other = next(trial.name for trial in record.trials if trial.name != record.best.trial)
    done = soflowctl("promote", f"{record.id}/{other}", "--dry-run", "--json", *place)
    decision = json.loads(done.stdout)
    assert done.returncode == {"promoted": 0, "refused": 1}[decision["decision"]], done.stderr
    assert ("is refused: " in done.stderr) == (decision["decision"] == "refused")
    assert [each["metric"] for each in decision["scores"]] == ["fd", "precision", "recall", "label_agreement"]
    assert all(len(each["candidate"]) == len(each["champion"]) == 5 for each in decision["scores"])
    assert (decision["samples"], decision["against"], decision["changed"]) == (64, "1", False)
    assert len(client.search_model_versions("name = 'digits'")) == 1


def test_images_differ_by_label_and_by_sample(
    swept: tuple[ProjectFolder, str], soflowctl: Run, tmp_path: Path
) -> None:
    place = ("--storage", str(swept[0].root))
    done = soflowctl(
        "generate", "--model", "digits", "--num", "12", "--label", "7", "--out", str(tmp_path / "a"), *place
    )
    assert done.returncode == 0, done.stderr
    sevens = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "a").glob("*-label-7.png"))]
    assert len(sevens) == 12
    assert len({image.tobytes() for image in sevens}) == 12


def test_runs_lists_the_sweep_and_its_trials(
    swept: tuple[ProjectFolder, str], record: SweepRecord, soflowctl: Run
) -> None:
    place = ("--storage", str(swept[0].root))
    listed = soflowctl("runs", *place)
    assert record.id in listed.stdout
    assert "finished" in listed.stdout
    assert "digits v1" in listed.stdout
    trials = soflowctl("runs", record.id, *place)
    for trial in record.trials:
        assert trial.name in trials.stdout
    assert trials.stdout.count("40/40") == 4
