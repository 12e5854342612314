"""Scores depend on their settings alone, are kept, and are logged once on the run and the version they belong to."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from soflow_core.failures import InputError
from soflow_pipelines.metrics import EVALUATOR, FeatureStatistics, frechet_distance
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.digits import load_digits
from soflow_platform.errors import JobError
from soflow_platform.evaluation.feature_networks import feature_network
from soflow_platform.jobs.evaluate import Score, evaluate, settings_digest
from soflow_platform.jobs.log_scores import log_scores, metric_name
from soflow_platform.jobs.requests import EvaluateRequest, ProtocolRequest
from soflow_platform.jobs.targets import EvaluationTarget, find_target
from soflow_platform.registry.versions import register
from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.code_digest import Code, running_code
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.tuning.record import BestTrial, load_record
from tests.support.generators import save_generator
from tests.support.scored_sweep import SWEEP, local_services, scores_of
from tests.support.small_networks import latent_set

TRIAL = f"{SWEEP}/trial-01-flow_matching"


@pytest.fixture
def store(scored: ProjectFolder) -> TrackingStore:
    return TrackingStore(scored.tracking_uri)


def test_the_score_of_a_checkpoint_is_the_one_that_training_reported(
    scored: ProjectFolder, store: TrackingStore
) -> None:
    """Same samples, labels, seed, features and reference; the batches of the forward passes differ."""
    record = load_record(scored, SWEEP)
    assert record is not None
    config = record.experiment["evaluation"]
    best = find_target(TRIAL, scored, store)
    scores = scores_of(scored, TRIAL, labels=config["labels"], steps=(1, 2))
    assert best.weights is not None
    position = json.loads((best.weights.parent / "checkpoint.json").read_text())
    reported = next(e for e in position["evaluations"] if e["step"] == best.step)
    for score in scores:
        nfe = score.tags["nfe"]
        assert score.values["fd"] == pytest.approx(reported[f"eval/fd_nfe{nfe}"], rel=1e-4)
        assert score.values["label_agreement"] == reported[f"eval/label_agreement_nfe{nfe}"]


def test_a_score_names_every_setting_that_decides_it(scored: ProjectFolder) -> None:
    (score,) = scores_of(
        scored, TRIAL, steps=(2,), settings={"sampler": "heun", "sampling_scale": 2.0}, seed=5
    )
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
        {"settings": {"sampling_scale": 3.0}},
        {"num": 99},
    ],
)
def test_a_setting_that_changes_the_value_changes_the_digest(
    scored: ProjectFolder, settings: dict[str, Any]
) -> None:
    (usual,), (other,) = scores_of(scored, TRIAL), scores_of(scored, TRIAL, **settings)
    assert usual.digest != other.digest
    assert usual.values["fd"] != other.values["fd"]


def test_a_stored_score_is_read_and_not_computed_again(scored: ProjectFolder) -> None:
    (first,) = scores_of(scored, TRIAL)
    (path,) = (scored.root / "evaluations" / "results").iterdir()
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "values": {"fd": -1.0}}))
    assert scores_of(scored, TRIAL)[0].values == {"fd": -1.0}
    path.unlink()
    assert scores_of(scored, TRIAL)[0] == first


def test_a_stored_score_of_other_code_is_not_taken(
    scored: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = scores_of(scored, TRIAL)
    (path,) = (scored.root / "evaluations" / "results").iterdir()
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "values": {"fd": -1.0}}))
    monkeypatch.setattr("soflow_platform.jobs.evaluate.running_code", lambda: Code({"loss.py": "0"}))
    assert scores_of(scored, TRIAL)[0] == first


def digits_folder(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir()
    for number, image in enumerate(load_digits().images[first : first + count, 0]):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
    return folder


def test_a_folder_and_an_npz_file_of_the_same_images_score_alike(
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
    targets = [str(digits_folder(tmp_path / "fake", 300)), str(tmp_path / "samples.npz")]
    for target in targets:
        (score,) = scores_of(
            scored, target, num=None, features="digits-classifier", reference=str(real), metrics=("fd",)
        )
        assert score.values == {"fd": pytest.approx(expected, rel=1e-6)}
        assert score.tags["samples"] == "300"
        assert score.tags["reference_samples"] == "600"


def test_images_that_were_replaced_are_scored_anew(scored: ProjectFolder, tmp_path: Path) -> None:
    folder, real = digits_folder(tmp_path / "fake", 100), str(scored.data / "digits")
    settings: dict[str, Any] = {"features": "digits-classifier", "reference": real, "metrics": ("fd",)}
    (before,) = scores_of(scored, str(folder), **settings)
    for path in folder.iterdir():
        # The same names and sizes, other images.
        pixels = np.asarray(Image.open(path)).copy()
        content = path.stat().st_size
        Image.fromarray(255 - pixels).save(path)
        path.write_bytes(path.read_bytes().ljust(content, b"\0"))
    (after,) = scores_of(scored, str(folder), **settings)
    assert after.values["fd"] > 2 * before.values["fd"]


def test_equal_images_have_distance_zero(scored: ProjectFolder, tmp_path: Path) -> None:
    one, other = digits_folder(tmp_path / "one", 200), digits_folder(tmp_path / "other", 200)
    (score,) = scores_of(
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
        {"settings": {"sampler": "ddpm"}},
        "flow_matching: sampler is 'ddpm'; it is one of 'euler', 'heun'",
    ),
    (
        {"settings": {"sampling_scale": "much"}},
        "flow_matching: `sampling_scale` is 'much': input should be a valid number",
    ),
    ({"reference": "/nowhere"}, "/nowhere"),
    ({"features": "pooled", "reference": "IMAGES"}, "its reference is a shard set, not"),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES)
def test_what_cannot_be_scored_is_refused_in_one_sentence(
    scored: ProjectFolder, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    if settings.get("reference") == "IMAGES":
        settings = {**settings, "reference": str(digits_folder(tmp_path / "images", 3))}
    with pytest.raises(InputError) as caught:
        scores_of(scored, TRIAL, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_features_of_the_training_space_need_no_autoencoder(tmp_path: Path) -> None:
    """The autoencoder of the latents is known by its folder's name alone, which is nowhere to be found."""
    _, data, _ = latent_set(tmp_path)
    model = save_generator(tmp_path / "ema.safetensors", read_info(data))
    project = ProjectFolder(tmp_path / "runs")
    settings = {"num": 64, "reference": str(data)}
    (score,) = scores_of(project, str(model), features="pooled", **settings)
    assert np.isfinite(score.values["fd"])
    assert "autoencoder" not in score.tags
    with pytest.raises(InputError, match="Name its folder with --autoencoder"):
        scores_of(project, str(model), features="inception", **settings)


def test_a_sampler_setting_of_another_method_is_refused(scored: ProjectFolder) -> None:
    with pytest.raises(
        InputError, match="flow_matching has no sampling setting `drop`: it has sampler, sampling_grid, samp"
    ):
        scores_of(scored, TRIAL, settings={"drop": 0.5})
    with pytest.raises(InputError, match="soflow: sampler is 'ddim'; it is one of 'consistency', 'ode'"):
        scores_of(scored, f"{SWEEP}/trial-00", settings={"sampler": "ddim"})


def test_one_network_is_scored_with_each_sampler_at_any_times(scored: ProjectFolder) -> None:
    ways: list[dict[str, Any]] = [
        {},
        {"sampling_times": [0.5]},
        {"sampling_times": [0.3]},
        {"sampler": "ode"},
        {"sampler": "ode", "sampling_times": [0.3]},
        {"sampling_grid": "power:3"},
    ]
    usual, even, *others = (
        scores_of(scored, f"{SWEEP}/trial-00", steps=(2,), settings=way)[0] for way in ways
    )
    assert "sampler" not in usual.tags
    assert "sampling_times" not in usual.tags
    assert (others[2].tags["sampler"], others[2].tags["sampling_times"]) == ("ode", "0.3")
    assert {score.tags["nfe"] for score in (usual, even, *others)} == {"2"}
    assert usual.values == even.values
    assert len({score.values["fd"] for score in (usual, *others)}) == 5
    assert others[-1].tags["sampling_grid"] == "power:3"


def test_images_need_a_reference_and_the_requested_number(scored: ProjectFolder, tmp_path: Path) -> None:
    folder = str(digits_folder(tmp_path / "images", 4))
    with pytest.raises(InputError, match="holds 4 images, 100 were asked for"):
        scores_of(scored, folder)
    with pytest.raises(InputError, match="fd compares with real images, and where those are is not known"):
        scores_of(scored, folder, num=None, features="digits-classifier", metrics=("fd",))


def test_a_plot_of_images_is_refused_before_they_are_scored(scored: ProjectFolder, tmp_path: Path) -> None:
    folder = digits_folder(tmp_path / "images", 20)
    protocol = ProtocolRequest(features="digits-classifier", reference=str(scored.data / "digits"))
    request = EvaluateRequest(str(folder), protocol=protocol, plotted=True)
    with pytest.raises(InputError, match="holds images: --plot is for a network that makes them"):
        evaluate(request, local_services(scored))
    assert not (scored.root / "evaluations" / "results").exists()


def test_changed_training_data_are_refused_as_reference(scored: ProjectFolder) -> None:
    description = scored.data / "digits" / "dataset.json"
    content = json.loads(description.read_text())
    description.write_text(json.dumps({**content, "digest": "sha256:" + "0" * 64}))
    with pytest.raises(InputError, match=r"holds other data .* than the network was trained on"):
        scores_of(scored, TRIAL)


def test_fewer_samples_than_features_are_flagged(scored: ProjectFolder) -> None:
    (score,) = scores_of(scored, TRIAL, num=50)
    (flag,) = score.flags
    assert "fewer images than features" in flag


def test_scores_are_logged_once_with_their_settings(scored: ProjectFolder, store: TrackingStore) -> None:
    target = find_target(TRIAL, scored, store)
    scores = scores_of(scored, TRIAL, num=1000, steps=(1, 2))
    names = log_scores(target, scores, store)
    assert names == [
        "evaluate/fd1k_nfe1_uniform",
        "evaluate/label_agreement1k_nfe1_uniform",
        "evaluate/fd1k_nfe2_uniform",
        "evaluate/label_agreement1k_nfe2_uniform",
    ]
    assert log_scores(target, scores, store) == names
    client = store.client
    assert target.run is not None
    (point,) = client.get_metric_history(target.run, names[2])
    assert (point.step, point.value) == (target.step, scores[1].values["fd"])
    settings = json.loads(client.get_run(target.run).data.tags[f"{names[2]}.settings"])
    assert settings == {**scores[1].tags, "flags": scores[1].flags, "code": running_code().digest}


def test_a_score_of_other_code_replaces_the_one_that_is_logged(
    scored: ProjectFolder, store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = find_target(TRIAL, scored, store)
    score = Score(TRIAL, {"fd": 1.0}, {}, [], {"samples": "100", "nfe": "1", "labels": "uniform"})
    (name,) = log_scores(target, [score], store)
    monkeypatch.setattr("soflow_platform.jobs.log_scores.running_code", lambda: Code({"loss.py": "0"}))
    assert log_scores(target, [replace(score, values={"fd": 2.0})], store) == [name]
    assert store.client.get_run(target.run or "").data.metrics[name] == 2.0


def test_other_settings_under_the_same_name_get_a_suffix(scored: ProjectFolder, store: TrackingStore) -> None:
    target = find_target(TRIAL, scored, store)
    first, second = (
        scores_of(scored, TRIAL, metrics=("fd",)),
        scores_of(scored, TRIAL, metrics=("fd",), seed=1),
    )
    assert log_scores(target, first, store) == ["evaluate/fd100_nfe1_uniform"]
    named = log_scores(target, second, store)
    moving = {key: value for key, value in second[0].tags.items() if key != "reference"}
    assert named == [f"evaluate/fd100_nfe1_uniform_{settings_digest(moving)[:6]}"]
    assert log_scores(target, second, store) == named
    metrics = store.client.get_run(target.run or "").data.metrics
    assert [metrics[name] for name in ("evaluate/fd100_nfe1_uniform", *named)] == [
        first[0].values["fd"],
        second[0].values["fd"],
    ]


def test_the_same_reference_at_another_place_is_the_same_setting(
    scored: ProjectFolder, store: TrackingStore
) -> None:
    target = find_target(TRIAL, scored, store)
    shutil.copytree(scored.data / "digits", scored.root / "mounted" / "digits")
    first = scores_of(scored, TRIAL, metrics=("fd",), reference=str(scored.data / "digits"))
    second = scores_of(scored, TRIAL, metrics=("fd",), reference=str(scored.root / "mounted" / "digits"))
    assert first[0].tags["reference"] != second[0].tags["reference"]
    names = [log_scores(target, scores, store) for scores in (first, second)]
    assert names == [["evaluate/fd100_nfe1_uniform"]] * 2


def test_a_version_gets_a_score_that_its_run_has_already(scored: ProjectFolder, store: TrackingStore) -> None:
    record = load_record(scored, SWEEP)
    assert record is not None
    tracking = Tracking(store, record.experiment_id or "")
    trial = "trial-00-soflow"
    of_trial = find_target(f"{SWEEP}/{trial}", scored, store)
    steps = {c.state.step: c for c in CheckpointStore(scored.trial(SWEEP, trial) / "checkpoints").published()}
    record.best = BestTrial(trial, of_trial.step, {"eval/fd_nfe1": 1.0})
    number = register(tracking, record.candidate("digits"), steps[of_trial.step or 0])
    (score,) = scores_of(scored, of_trial.name.split(" ")[0], metrics=("fd",))
    names = log_scores(of_trial, [score], store)
    of_version = find_target(f"models:/digits/{number}", scored, store)
    assert of_version.run == of_trial.run
    assert log_scores(of_version, [score], store) == names
    client = store.client
    tags = client.get_model_version("digits", number).tags
    assert float(tags[names[0]]) == score.values["fd"]
    settings = json.loads(tags[f"{names[0]}.settings"])
    assert settings == {**score.tags, "flags": score.flags, "code": running_code().digest}
    assert len(client.get_metric_history(of_trial.run or "", names[0])) == 1


def test_scores_without_run_and_version_are_not_logged(store: TrackingStore) -> None:
    score = Score("images", {"fd": 1.0}, {}, [], {"samples": "50000"})
    assert log_scores(EvaluationTarget("images", images="somewhere"), [score], store) == []
    assert metric_name("fid", score.tags) == "evaluate/fid50k"


def test_a_tracking_store_that_refuses_scores_is_a_failed_job(store: TrackingStore) -> None:
    score = Score("images", {"fd": 1.0}, {}, [], {"samples": "50000"})
    with pytest.raises(JobError, match=r"the scores are kept, but .* did not take them"):
        log_scores(EvaluationTarget("run", run="0" * 32), [score], store)
