"""A candidate is scored against the champion under one protocol, and its alias moves where it is better by more than the noise."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from soflow_core.weights import load_weights, save_weights
from soflow_pipelines.shards.tables import read_info
from soflow_platform.config.gate import GateConfig
from soflow_platform.config.validation import read_experiment
from soflow_platform.errors import JobError, UserError
from soflow_platform.jobs.gate_scores import (
    Contender,
    GateProtocol,
    GateScorer,
    gate_protocol,
    selection_flags,
    with_autoencoder,
)
from soflow_platform.jobs.promote import Outcome, promote
from soflow_platform.jobs.requests import PromoteRequest
from soflow_platform.jobs.targets import EvaluationTarget
from soflow_platform.registry.gate import Comparison
from soflow_platform.registry.versions import NewVersion, describe_weights, find_version, register_weights
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.tuning.record import load_record
from tests.support.generators import save_generator
from tests.support.scored_sweep import ROOT, SWEEP, artifacts_of, local_services
from tests.support.small_networks import latent_set

FIRST, SECOND = f"{SWEEP}/trial-00-soflow", f"{SWEEP}/trial-01-flow_matching"
GUARDS = ("precision", "recall", "label_agreement")


def decide(project: ProjectFolder, model: str, **settings: Any) -> Outcome:
    return promote(PromoteRequest(model, **settings), local_services(project))


def champion(project: ProjectFolder) -> str | None:
    version = (
        TrackingStore(project.tracking_uri).client.get_registered_model("digits").aliases.get("champion")
    )
    return None if version is None else str(version)


def change_gate(project: ProjectFolder, **gate: Any) -> None:
    """Gives the sweep of the project another gate, as its file would."""
    record = load_record(project, SWEEP)
    assert record is not None
    record.experiment["registry"]["gate"] |= gate
    record.save(project)


def register_changed(project: ProjectFolder, like: str, shift: float) -> str:
    """Registers the weights of a version with `shift` on its output: a network whose images are lighter or darker."""
    store = TrackingStore(project.tracking_uri)
    version = find_version(store, f"digits/{like}")
    services = local_services(project)
    target = services.resolver.find(f"models:/digits/{like}")
    assert target.weights is not None
    weights = load_weights(target.weights)
    tensors = dict(weights.tensors)
    tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"] + shift
    assert weights.objective is not None
    path = project.root / "ema.safetensors"
    save_weights(path, tensors, weights.network_config, weights.objective, weights.data)
    kept = {
        key: value
        for key, value in version.tags.items()
        if key.startswith(("soflow.", "eval.", "data.", "metric", "mode"))
    }
    tracking = Tracking(store, store.client.get_experiment_by_name("digits").experiment_id)
    evaluation = {"metrics": {}, "settings": {}}
    return register_weights(
        tracking, NewVersion("digits", path, describe_weights(path, {}, evaluation), kept)
    )


def promote_first(project: ProjectFolder) -> ProjectFolder:
    """Makes the first trial champion, version 1."""
    change_gate(project, seeds=3)
    assert decide(project, FIRST).decision.kind == "promoted"
    return project


@pytest.fixture(scope="module")
def promoted_once(scored_once: ProjectFolder, tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    root = shutil.copytree(scored_once.root, tmp_path_factory.mktemp("promoted") / "runs")
    return promote_first(ProjectFolder(Path(root)))


@pytest.fixture
def promoted(promoted_once: ProjectFolder, tmp_path: Path) -> ProjectFolder:
    """A project whose first trial is champion, version 1; its files lie where those of all tests do."""
    return ProjectFolder(Path(shutil.copytree(promoted_once.root, tmp_path / "runs")))


def test_a_trial_is_registered_and_becomes_the_first_champion(promoted: ProjectFolder) -> None:
    store = TrackingStore(promoted.tracking_uri)
    version = find_version(store, "digits@champion")
    assert (str(version.version), version.tags["soflow.trial"]) == ("1", "trial-00-soflow")
    assert version.tags["promotion.reason"] == "first champion"
    with pytest.raises(UserError, match="version 1 of 'digits' is the champion already"):
        decide(promoted, FIRST)


def test_both_are_scored_under_one_protocol_with_seeds_of_its_own(promoted: ProjectFolder) -> None:
    outcome = decide(promoted, SECOND, dry_run=True)
    numbers = outcome.decision.numbers
    assert (numbers["seeds"], numbers["samples"], numbers["nfe"]) == ([1000, 1001, 1002], 100, 1)
    assert [each.metric for each in outcome.comparisons] == ["fd", *GUARDS]
    assert all(len(each.candidate) == len(each.champion or ()) == 3 for each in outcome.comparisons)
    results = [
        json.loads(p.read_text())["tags"] for p in (promoted.root / "evaluations" / "results").iterdir()
    ]
    shared = {
        tuple((key, tags[key]) for key in ("labels", "samples", "nfe", "features", "reference_digest"))
        for tags in results
    }
    assert len(shared) == 1
    assert len(results) == 6


def test_a_dry_run_changes_nothing(promoted: ProjectFolder) -> None:
    client = TrackingStore(promoted.tracking_uri).client
    before = client.get_model_version("digits", "1").tags
    outcome = decide(promoted, SECOND, dry_run=True)
    assert outcome.promotion is None
    assert champion(promoted) == "1"
    assert client.get_model_version("digits", "1").tags == before
    assert len(client.search_model_versions("name = 'digits'")) == 1


def test_the_same_images_under_another_name_are_refused(promoted: ProjectFolder) -> None:
    """A network cannot be better than itself, however often it is scored."""
    number = register_changed(promoted, "1", 0.0)
    outcome = decide(promoted, f"digits/{number}")
    assert outcome.decision.kind == "refused"
    assert outcome.comparisons[0].gain == 0
    assert champion(promoted) == "1"
    tags = find_version(TrackingStore(promoted.tracking_uri), f"digits/{number}").tags
    assert (tags["promotion.decision"], tags["promotion.against"]) == ("refused", "1")
    kept = json.loads(tags["promotion.numbers"])
    assert kept["scores"][0]["candidate"] == list(outcome.comparisons[0].candidate)


def test_the_worse_of_two_networks_is_refused_and_the_better_one_passes(promoted: ProjectFolder) -> None:
    """Which way round is decided by the scores: one order must pass and the other must not, unless a guard refuses."""
    change_gate(promoted, seeds=3, guards=[])
    number = register_changed(promoted, "1", 1.0)
    recipe = json.loads(find_version(TrackingStore(promoted.tracking_uri), "digits/1").tags["soflow.recipe"])
    recipe["registry"]["gate"]["guards"] = []
    client = TrackingStore(promoted.tracking_uri).client
    for version in ("1", number):
        client.set_model_version_tag("digits", version, "soflow.recipe", json.dumps(recipe))
    there = decide(promoted, f"digits/{number}", dry_run=True)
    worse, better = ("1", number) if there.decision.kind == "promoted" else (number, "1")
    client.set_registered_model_alias("digits", "champion", worse)
    passed = decide(promoted, f"digits/{better}")
    assert passed.promotion is not None
    assert champion(promoted) == better
    refused = decide(promoted, f"digits/{worse}")
    assert refused.decision.kind == "refused"
    assert passed.comparisons[0].gain == pytest.approx(-refused.comparisons[0].gain)
    assert passed.comparisons[0].gain > passed.comparisons[0].noise > 0


def test_a_guard_refuses_what_the_first_metric_lets_pass(promoted: ProjectFolder) -> None:
    number = register_changed(promoted, "1", 0.5)
    client = TrackingStore(promoted.tracking_uri).client
    recipe = json.loads(find_version(TrackingStore(promoted.tracking_uri), "digits/1").tags["soflow.recipe"])
    recipe["registry"]["gate"] |= {"guards": [{"metric": "fd", "features": "pooled", "limit": 1e-6}]}
    client.set_model_version_tag("digits", number, "soflow.recipe", json.dumps(recipe))
    outcome = decide(promoted, f"digits/{number}", dry_run=True)
    assert outcome.decision.kind == "refused"
    assert "fd on pooled-1x8x8-1 is" in outcome.decision.reason
    assert "does not reach the limit 1e-06" in outcome.decision.reason
    assert len({each.features for each in outcome.comparisons}) == 2
    # A second feature network looks at it.
    assert not any("was chosen" in flag for flag in outcome.flags)


def test_a_candidate_chosen_by_the_features_that_decide_is_flagged(promoted: ProjectFolder) -> None:
    outcome = decide(promoted, SECOND, dry_run=True)
    (flag,) = [flag for flag in outcome.flags if "was chosen" in flag]
    assert "among 2 trials by the features that decide here (digits-classifier)" in flag


def test_a_sweep_that_is_ranked_on_pooled_features_beside_its_own_is_compared_on_them() -> None:
    experiment, _ = read_experiment(ROOT / "sweeps" / "b4.yaml", ("search.metric=eval/fd_nfe2",))
    candidate = Contender("version 1", EvaluationTarget("version 1"), experiment.resolved())
    protocol = gate_protocol(PromoteRequest("b4"), candidate, None)
    assert (protocol.metric, protocol.features, protocol.nfe) == ("fd", "pooled", 2)
    (flag,) = selection_flags(candidate, protocol, [Comparison("fd", "pooled-4x8x8-1", "min", (1.0,), None)])
    assert "was chosen by the features that decide here (pooled)" in flag
    experiment, _ = read_experiment(ROOT / "sweeps" / "b4.yaml", ("registry.gate.metric=kid",))
    protocol = gate_protocol(
        PromoteRequest("b4"), replace(candidate, recipe=experiment.resolved()), champion=None
    )
    assert (protocol.metric, protocol.features) == ("kid", "inception")


def test_the_autoencoder_of_the_candidates_sweep_decodes_where_it_is_still_there(tmp_path: Path) -> None:
    own, gone = tmp_path / "autoencoder", tmp_path / "gone"
    own.mkdir()
    asked = {}
    for place in (own, gone):
        overrides = (f"evaluation.autoencoder={place}",)
        experiment, _ = read_experiment(ROOT / "sweeps" / "b4.yaml", overrides)
        candidate = Contender("version 1", EvaluationTarget("version 1"), experiment.resolved())
        asked[place] = with_autoencoder(PromoteRequest("b4"), candidate).autoencoder
        other = PromoteRequest("b4", autoencoder="other")
        assert with_autoencoder(other, candidate).autoencoder == "other"
    assert asked == {own: str(own), gone: None}


def test_fewer_samples_than_the_sweep_took_are_refused(promoted: ProjectFolder) -> None:
    with pytest.raises(UserError, match="--samples 50 is less than the 100 samples of the sweep"):
        decide(promoted, SECOND, dry_run=True, samples=50)
    assert decide(promoted, SECOND, dry_run=True, samples=128).decision.numbers["samples"] == 128


def test_a_champion_whose_weights_are_gone_is_said(scored: ProjectFolder) -> None:
    promoted = promote_first(scored)
    (artifacts_of(promoted, "1") / "ema.safetensors").unlink()
    with pytest.raises(JobError, match=r"champion version 1 of 'digits' cannot be scored.*pass --force"):
        decide(promoted, SECOND)
    assert champion(promoted) == "1"
    assert decide(promoted, SECOND, force="the champion is gone").promotion is not None
    assert champion(promoted) == "2"


def test_a_reference_that_is_gone_is_said(promoted: ProjectFolder) -> None:
    from soflow_core.failures import InputError

    with pytest.raises(InputError, match="nowhere"):
        decide(promoted, SECOND, dry_run=True, reference=str(promoted.root / "nowhere"))
    assert champion(promoted) == "1"


def test_networks_that_no_protocol_scores_both_are_refused(promoted: ProjectFolder) -> None:
    target = local_services(promoted).resolver.find("models:/digits/1")
    assert target.weights is not None
    weights = load_weights(target.weights)
    config = replace(weights.network_config, classes=5)
    tensors = load_file(target.weights)
    for name in tensors:
        if "embedding_table" in name:
            tensors[name] = torch.zeros(5 + int(config.null_label), config.hidden)
    path = promoted.root / "ema.safetensors"
    assert weights.objective is not None
    save_weights(path, tensors, config, weights.objective, weights.data)
    store = TrackingStore(promoted.tracking_uri)
    tags = {"soflow.recipe": find_version(store, "digits/1").tags["soflow.recipe"]}
    tracking = Tracking(store, store.client.get_experiment_by_name("digits").experiment_id)
    description = describe_weights(path, {}, {"metrics": {}, "settings": {}})
    number = register_weights(tracking, NewVersion("digits", path, description, tags))
    with pytest.raises(UserError, match=r"have different classes \(5 and 10\): no protocol scores both"):
        decide(promoted, f"digits/{number}")


def test_a_version_without_recipe_or_sweep_is_refused_with_a_way_out(promoted: ProjectFolder) -> None:
    number = register_changed(promoted, "1", 0.0)
    client = TrackingStore(promoted.tracking_uri).client
    for tag in ("soflow.recipe", "soflow.sweep"):
        client.delete_model_version_tag("digits", number, tag)
    with pytest.raises(UserError, match=r"the recipe of version \d+ .* pass --reuse-scores, or --force"):
        decide(promoted, f"digits/{number}")


def test_the_gate_asks_for_no_autoencoder_that_its_features_do_not_need(tmp_path: Path) -> None:
    _, data, _ = latent_set(tmp_path)
    model = save_generator(tmp_path / "ema.safetensors", read_info(data))
    contender = Contender(
        "a model of latents", EvaluationTarget("latents", weights=model, data=str(data)), {}
    )
    protocol = GateProtocol(
        GateConfig(seeds=2), "fd", "pooled", nfe=1, samples=64, labels="uniform", guards=None
    )
    services = local_services(ProjectFolder(tmp_path / "runs"))
    scored = GateScorer(PromoteRequest("latents"), protocol, services).scores(contender, None)
    assert [each.metric for each in scored.comparisons] == ["fd", "precision", "recall"]
    assert all(math.isfinite(value) for each in scored.comparisons for value in each.candidate)
