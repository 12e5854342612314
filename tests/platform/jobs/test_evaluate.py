"""A score is what its settings say: taken against the right images, kept, logged once where it belongs, refused where it is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from soflow_pipelines.metrics import EVALUATOR, FeatureStatistics, frechet_distance
from soflow_pipelines.sources.digits import load_digits
from soflow_platform.errors import JobError, UserError
from soflow_platform.evaluation.feature_networks import feature_network
from soflow_platform.evaluation.runner import RayStatisticsRunner
from soflow_platform.evaluation.statistics import StatisticsJob
from soflow_platform.jobs.evaluate import EvaluateRequest, Score, evaluate, settings_digest
from soflow_platform.jobs.log_scores import log_scores, metric_name
from soflow_platform.jobs.targets import EvaluationTarget, find_target
from soflow_platform.registry.versions import register
from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.tuning.record import load_record
from tests.support.scored_sweep import SWEEP, measure_here

TRIAL = f"{SWEEP}/trial-01-flow_matching"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are made in this process before they are asked of a cluster, which then has nothing to do."""
    ask = RayStatisticsRunner.statistics

    def statistics(self: RayStatisticsRunner, measurements: list[StatisticsJob]) -> Any:
        for measurement in measurements:
            measure_here(self._storage, measurement)
        return ask(self, measurements)

    monkeypatch.setattr(RayStatisticsRunner, "statistics", statistics)


def run(storage: ProjectFolder, subject: str, **settings: Any) -> list[Score]:
    request = EvaluateRequest(subject, **{"num": 100, **settings})
    return evaluate(request, storage, TrackingStore(storage.tracking_uri))[1]


def test_the_score_of_a_checkpoint_is_the_one_that_training_reported(scored: ProjectFolder) -> None:
    """Same samples, labels, seed, features and reference; the batches of the forward passes differ."""
    record = load_record(scored, SWEEP)
    assert record is not None
    config = record.experiment["evaluation"]
    best = find_target(TRIAL, scored, TrackingStore(scored.tracking_uri))
    scores = run(scored, TRIAL, labels=config["labels"], steps=(1, 2))
    assert best.weights is not None
    position = json.loads((best.weights.parent / "checkpoint.json").read_text())
    reported = next(e for e in position["evaluations"] if e["step"] == best.step)
    for score in scores:
        nfe = score.tags["nfe"]
        assert score.values["fd"] == pytest.approx(reported[f"eval/fd_nfe{nfe}"], rel=1e-4)
        assert score.values["label_agreement"] == reported[f"eval/label_agreement_nfe{nfe}"]


def test_a_score_says_every_setting_that_moves_it(scored: ProjectFolder) -> None:
    (score,) = run(scored, TRIAL, steps=(2,), sampling={"sampler": "heun", "sampling_scale": 2.0}, seed=5)
    reference = json.loads((scored.data / "digits" / "dataset.json").read_text())["digest"]
    assert score.tags | {"weights": "", "features": ""} == {
        "weights": "",
        "method": "flow_matching",
        "steps": "2",
        "nfe": "8",
        "sampler": "heun",
        "sampling_scale": "2.0",
        "labels": "uniform",
        "seed": "5",
        "samples": "100",
        "evaluator": EVALUATOR,
        "features": "",
        "reference": str(scored.data / "digits"),
        "reference_digest": reference.split(":")[1][:16],
        "reference_samples": "1797",
    }
    assert score.tags["features"].startswith("digits-cnn-1-")


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": (2,)},
        {"seed": 1},
        {"labels": "balanced"},
        {"sampling": {"sampling_scale": 3.0}},
        {"num": 99},
    ],
)
def test_a_setting_that_moves_the_number_is_told_apart(
    scored: ProjectFolder, settings: dict[str, Any]
) -> None:
    (usual,), (other,) = run(scored, TRIAL), run(scored, TRIAL, **settings)
    assert usual.digest != other.digest
    assert usual.values["fd"] != other.values["fd"]


def test_a_score_that_was_taken_is_read_and_not_taken_again(scored: ProjectFolder) -> None:
    (first,) = run(scored, TRIAL)
    (path,) = (scored.root / "evaluations" / "results").iterdir()
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "values": {"fd": -1.0}}))
    assert run(scored, TRIAL)[0].values == {"fd": -1.0}
    path.unlink()
    assert run(scored, TRIAL)[0] == first


def digits_folder(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir()
    for number, image in enumerate(load_digits().images[first : first + count, 0]):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
    return folder


def test_images_of_a_folder_and_of_an_npz_file_score_as_the_images_they_are(
    scored: ProjectFolder, tmp_path: Path
) -> None:
    images = load_digits().images
    network = feature_network("digits-classifier", (1, 8, 8), scored)
    moments = []
    for part in (images[:300], images[300:900]):
        statistics = FeatureStatistics(network.dim)
        statistics.update(network(torch.from_numpy(part)).features)
        moments.append(statistics.moments())
    expected = frechet_distance(*moments)
    real = digits_folder(tmp_path / "real", 600, first=300)
    colour = np.repeat(images[:300].transpose(0, 2, 3, 1), 3, axis=3)
    np.savez(tmp_path / "samples.npz", arr_0=colour)
    subjects = [str(digits_folder(tmp_path / "fake", 300)), str(tmp_path / "samples.npz")]
    for subject in subjects:
        (score,) = run(
            scored, subject, num=None, features="digits-classifier", reference=str(real), metrics=("fd",)
        )
        assert score.values == {"fd": pytest.approx(expected, rel=1e-6)}
        assert score.tags["samples"] == "300"
        assert score.tags["reference_samples"] == "600"


def test_images_that_were_written_anew_are_scored_anew(scored: ProjectFolder, tmp_path: Path) -> None:
    folder, real = digits_folder(tmp_path / "fake", 100), str(scored.data / "digits")
    settings: dict[str, Any] = {"features": "digits-classifier", "reference": real, "metrics": ("fd",)}
    (before,) = run(scored, str(folder), **settings)
    for path in folder.iterdir():
        # The same names and sizes, other images.
        pixels = np.asarray(Image.open(path)).copy()
        content = path.stat().st_size
        Image.fromarray(255 - pixels).save(path)
        path.write_bytes(path.read_bytes().ljust(content, b"\0"))
    (after,) = run(scored, str(folder), **settings)
    assert after.values["fd"] > 2 * before.values["fd"]


def test_images_score_nothing_against_themselves(scored: ProjectFolder, tmp_path: Path) -> None:
    one, other = digits_folder(tmp_path / "one", 200), digits_folder(tmp_path / "other", 200)
    (score,) = run(
        scored,
        str(one),
        num=None,
        features="digits-classifier",
        reference=str(other),
        metrics=("fd", "kid", "precision", "recall"),
    )
    assert score.values["fd"] == pytest.approx(0, abs=1e-6)
    assert score.values["precision"] == score.values["recall"] == 1.0


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"metrics": ("fdi",)}, "there is no metric 'fdi'; there are fid, fd, "),
    ({"metrics": ("fid",)}, "fid cannot be measured on the features digits-cnn-1-"),
    ({"features": "inceptoin"}, "there is no feature network 'inceptoin'; there are inception"),
    (
        {"sampling": {"sampler": "ddpm"}},
        "flow_matching: `sampler` is 'ddpm': input should be 'euler' or 'heun'",
    ),
    (
        {"sampling": {"sampling_scale": "much"}},
        "flow_matching: `sampling_scale` is 'much': input should be a valid number",
    ),
    ({"reference": "/nowhere"}, "/nowhere"),
    ({"features": "pooled", "reference": "IMAGES"}, "its reference is a shard set, not"),
]


@pytest.mark.parametrize(("settings", "said"), MISTAKES)
def test_what_cannot_be_scored_is_refused_in_a_sentence(
    scored: ProjectFolder, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    if settings.get("reference") == "IMAGES":
        settings = {**settings, "reference": str(digits_folder(tmp_path / "images", 3))}
    with pytest.raises(UserError) as caught:
        run(scored, TRIAL, **settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_method_is_sampled_by_its_own_settings_alone(scored: ProjectFolder) -> None:
    with pytest.raises(
        UserError, match="soflow has no sampling setting `sampler`: it has one way of sampling"
    ):
        run(scored, f"{SWEEP}/trial-00", sampling={"sampler": "ddim"})


def test_images_need_a_reference_and_as_many_as_are_asked_for(scored: ProjectFolder, tmp_path: Path) -> None:
    folder = str(digits_folder(tmp_path / "images", 4))
    with pytest.raises(UserError, match="holds 4 images, 100 were asked for"):
        run(scored, folder)
    with pytest.raises(UserError, match="fd compares with real images, and where those are is not known"):
        run(scored, folder, num=None, features="digits-classifier", metrics=("fd",))


def test_data_that_are_no_longer_those_of_the_training_are_no_reference(scored: ProjectFolder) -> None:
    description = scored.data / "digits" / "dataset.json"
    content = json.loads(description.read_text())
    description.write_text(json.dumps({**content, "digest": "sha256:" + "0" * 64}))
    with pytest.raises(UserError, match=r"holds other data .* than the network was trained on"):
        run(scored, TRIAL)


def test_fewer_samples_than_features_are_flagged(scored: ProjectFolder) -> None:
    (score,) = run(scored, TRIAL, num=50)
    (flag,) = score.flags
    assert "fewer images than features" in flag


def test_scores_go_to_their_run_once_with_their_settings(scored: ProjectFolder) -> None:
    subject = find_target(TRIAL, scored, TrackingStore(scored.tracking_uri))
    scores = run(scored, TRIAL, num=1000, steps=(1, 2))
    names = log_scores(subject, scores, TrackingStore(scored.tracking_uri))
    assert names == [
        "evaluate/fd1k_nfe1_uniform",
        "evaluate/label_agreement1k_nfe1_uniform",
        "evaluate/fd1k_nfe2_uniform",
        "evaluate/label_agreement1k_nfe2_uniform",
    ]
    assert log_scores(subject, scores, TrackingStore(scored.tracking_uri)) == names
    client = TrackingStore(scored.tracking_uri).client
    assert subject.run is not None
    (point,) = client.get_metric_history(subject.run, names[2])
    assert (point.step, point.value) == (subject.step, scores[1].values["fd"])
    settings = json.loads(client.get_run(subject.run).data.tags[f"{names[2]}.settings"])
    assert settings == {**scores[1].tags, "flags": scores[1].flags}


def test_other_settings_under_the_same_name_do_not_hide_the_first(scored: ProjectFolder) -> None:
    subject = find_target(TRIAL, scored, TrackingStore(scored.tracking_uri))
    first, second = run(scored, TRIAL, metrics=("fd",)), run(scored, TRIAL, metrics=("fd",), seed=1)
    assert log_scores(subject, first, TrackingStore(scored.tracking_uri)) == ["evaluate/fd100_nfe1_uniform"]
    named = log_scores(subject, second, TrackingStore(scored.tracking_uri))
    moving = {key: value for key, value in second[0].tags.items() if key != "reference"}
    assert named == [f"evaluate/fd100_nfe1_uniform_{settings_digest(moving)[:6]}"]
    assert log_scores(subject, second, TrackingStore(scored.tracking_uri)) == named
    metrics = TrackingStore(scored.tracking_uri).client.get_run(subject.run or "").data.metrics
    assert [metrics[name] for name in ("evaluate/fd100_nfe1_uniform", *named)] == [
        first[0].values["fd"],
        second[0].values["fd"],
    ]


def test_the_same_data_at_another_place_are_the_same_settings(scored: ProjectFolder) -> None:
    subject = find_target(TRIAL, scored, TrackingStore(scored.tracking_uri))
    shutil.copytree(scored.data / "digits", scored.root / "mounted" / "digits")
    first = run(scored, TRIAL, metrics=("fd",), reference=str(scored.data / "digits"))
    second = run(scored, TRIAL, metrics=("fd",), reference=str(scored.root / "mounted" / "digits"))
    assert first[0].tags["reference"] != second[0].tags["reference"]
    names = [log_scores(subject, scores, TrackingStore(scored.tracking_uri)) for scores in (first, second)]
    assert names == [["evaluate/fd100_nfe1_uniform"]] * 2


def test_a_version_gets_a_score_that_its_run_has_already(scored: ProjectFolder) -> None:
    record = load_record(scored, SWEEP)
    assert record is not None
    tracking = Tracking(TrackingStore(scored.tracking_uri), record.experiment_id or "")
    trial = "trial-00-soflow"
    of_trial = find_target(f"{SWEEP}/{trial}", scored, TrackingStore(scored.tracking_uri))
    steps = {c.state.step: c for c in CheckpointStore(scored.trial(SWEEP, trial) / "checkpoints").published()}
    record.best = {"trial": trial, "step": of_trial.step, "metrics": {"eval/fd_nfe1": 1.0}}
    number = register(tracking, record.candidate("digits"), steps[of_trial.step or 0])
    (score,) = run(scored, of_trial.name.split(" ")[0], metrics=("fd",))
    names = log_scores(of_trial, [score], TrackingStore(scored.tracking_uri))
    of_version = find_target(f"models:/digits/{number}", scored, TrackingStore(scored.tracking_uri))
    assert of_version.run == of_trial.run
    assert log_scores(of_version, [score], TrackingStore(scored.tracking_uri)) == names
    client = TrackingStore(scored.tracking_uri).client
    tags = client.get_model_version("digits", number).tags
    assert float(tags[names[0]]) == score.values["fd"]
    assert json.loads(tags[f"{names[0]}.settings"]) == {**score.tags, "flags": score.flags}
    assert len(client.get_metric_history(of_trial.run or "", names[0])) == 1


def test_what_belongs_to_no_run_is_logged_nowhere(scored: ProjectFolder) -> None:
    score = Score("images", {"fd": 1.0}, {}, [], {"samples": "50000"})
    assert (
        log_scores(
            EvaluationTarget("images", images="somewhere"), [score], TrackingStore(scored.tracking_uri)
        )
        == []
    )
    assert metric_name("fid", score.tags) == "evaluate/fid50k"


def test_a_tracking_store_that_does_not_take_them_is_a_failed_job(scored: ProjectFolder) -> None:
    score = Score("images", {"fd": 1.0}, {}, [], {"samples": "50000"})
    with pytest.raises(JobError, match=r"the scores are kept, but .* did not take them"):
        log_scores(EvaluationTarget("run", run="0" * 32), [score], TrackingStore(scored.tracking_uri))
