"""Averages whose length is chosen after training are those that would have been kept during it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from soflow_core.weights import load_weights
from soflow_platform.cli.averages import parse_lengths
from soflow_platform.errors import UserError
from soflow_platform.jobs import posthoc_ema
from soflow_platform.jobs.evaluate import Score, Services
from soflow_platform.jobs.posthoc_ema import (
    Average,
    EmaRequest,
    reconstruct,
    register_average,
    score_averages,
)
from soflow_platform.jobs.requests import EvaluateRequest, SamplingRequest
from soflow_platform.jobs.score_summary import plot, summaries, varied
from soflow_platform.jobs.targets import EvaluationTarget
from soflow_platform.registry.versions import find_version
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking
from soflow_platform.training.worker import Trainer
from soflow_platform.tuning.record import SweepRecord, TrialEntry
from tests.support.scored_sweep import SWEEP, local_services, scores_of

STEPS = 60
SHARES = {0.1: 1e-4, 0.07: 0.1, 0.15: 0.3}
"""Length -> largest error."""
LONG = (
    f"training.steps={STEPS}",
    "evaluation.every=60",
    "training.ema_snapshot_every=5",
)


@pytest.fixture
def trained(worker: Callable[..., Trainer], storage: ProjectFolder) -> Trainer:
    """A trial with snapshots of two averages, the record of its sweep, and a third average that was kept directly."""
    trainer = worker("trial", *LONG, "training.ema_profiles=[0.05, 0.1]")
    assert trainer.run()
    SweepRecord(
        id="sweep",
        name="sweep",
        file="sweep.yaml",
        experiment=trainer.experiment.resolved(),
        trials=[TrialEntry("trial", {}, STEPS)],
        metric="eval/fd_nfe1",
        mode="min",
    ).save(storage)
    return trainer


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[name] - b[name]).double().square().sum() for name in a) ** 0.5)


def test_an_average_that_was_not_kept_is_reconstructed(
    trained: Trainer, worker: Callable[..., Trainer], storage: ProjectFolder, tracking: Tracking
) -> None:
    kept = worker("directly", *LONG, "training.ema_profiles=[0.1, 0.15, 0.07]")
    assert kept.run()
    direct = {width: kept.train_step.ema.average(f"power-{width:g}") for width in (0.1, 0.15, 0.07)}
    found = reconstruct(EmaRequest("sweep/trial", (0.1, 0.15, 0.07)), storage)
    assert [(each.step, each.snapshots) for each in found] == [(STEPS, STEPS // 5)] * 3
    for average in found:
        made = load_weights(average.weights)
        assert made.objective == trained.experiment.objective
        assert torch.equal(made.tensors["pos_embed"], trained.train_step.module.state_dict()["pos_embed"])
        expected = direct[average.length]
        own = {name: made.tensors[name] for name in expected}
        # The distance between two averages that were kept is the scale. Profiles are continuous and sixty steps are few: a long
        # average reaches back to the first ones.
        scale = distance(direct[0.15], direct[0.07])
        assert distance(own, expected) < SHARES[average.length] * scale
        assert average.residual < (1e-6 if average.length == 0.1 else 0.05)

    version = register_average(found[1], "digits", tracking)
    registered = find_version(tracking.store, f"digits/{version}")
    assert registered.tags["soflow.ema_length"] == "0.15"
    assert "relative width 0.15" in registered.description


def test_scores_of_averages_are_one_table_and_one_plot_against_the_length(scored: ProjectFolder) -> None:
    store = scored.trial(SWEEP, "trial-00-soflow") / "checkpoints"
    kept = {
        0.05: store / "step-00000002" / "ema.safetensors",
        0.1: store / "step-00000006" / "ema.safetensors",
    }
    averages = [
        Average(path, SWEEP, "trial-00-soflow", 6, 48, length, 0.0, 3) for length, path in kept.items()
    ]
    scores = score_averages(averages, 100, SamplingRequest(steps=(1, 2), seeds=2), local_services(scored))
    rows = summaries(scores)
    assert [(row.name, row.tags["ema_length"], row.tags["nfe"], row.seeds) for row in rows] == [
        ("trial-00-soflow", length, nfe, ("0", "1")) for length in ("0.05", "0.1") for nfe in ("1", "2")
    ]
    assert varied(rows) == ["ema_length", "steps", "nfe"]
    one, two = scores_of(scored, str(kept[0.1]), steps=(2,), seeds=2)
    assert rows[-1].values["fd"] == (one.values["fd"] + two.values["fd"]) / 2
    assert plot(rows).startswith(b"\x89PNG")


def test_an_average_is_compared_with_the_data_of_its_sweep(
    scored: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file alone does not say where they are, unless they are built in."""
    seen: list[str | None] = []

    def score(target: EvaluationTarget, request: EvaluateRequest, services: Services) -> list[Score]:
        del request, services
        seen.append(target.data)
        return []

    monkeypatch.setattr(posthoc_ema, "score_target", score)
    weights = scored.trial(SWEEP, "trial-00-soflow") / "checkpoints" / "step-00000006" / "ema.safetensors"
    average = Average(weights, SWEEP, "trial-00-soflow", 6, 48, 0.1, 0.0, 3, "/shared/cifar10")
    score_averages([average], 100, SamplingRequest(), local_services(scored))
    assert seen == ["/shared/cifar10"]


def test_an_average_can_end_at_an_earlier_step(
    trained: Trainer, storage: ProjectFolder, tmp_path: Path
) -> None:
    (average,) = reconstruct(EmaRequest("sweep/trial", (0.1,), 30, tmp_path / "out"), storage)
    assert (average.step, average.images) == (30, 30 * trained.experiment.training.batch)
    assert average.data == "digits"
    (snapshot,) = (each for each in trained.setup.snapshots.published() if each.state.step == 30)
    with snapshot.opened("power-0.1.safetensors") as path:
        expected = load_weights(path).tensors
    for name, tensor in load_weights(average.weights).tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_what_cannot_be_reconstructed_is_refused(trained: Trainer, storage: ProjectFolder) -> None:
    for request, said in (
        (EmaRequest("sweep/trial", (0.5,)), "not above 0 and below 0.28"),
        (EmaRequest("sweep/trial", (0.1,), 31), "no snapshot of that step; it has 5, 10"),
        (EmaRequest("sweep/other", (0.1,)), "has no trial 'other'"),
    ):
        with pytest.raises(UserError, match=said):
            reconstruct(request, storage)
    damaged = Path(trained.setup.snapshots.root) / "step-00000005" / "power-0.05.safetensors"
    damaged.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged"):
        reconstruct(EmaRequest("sweep/trial", (0.1,)), storage)
    with pytest.raises(UserError, match="no list of numbers"):
        parse_lengths("short")


def test_without_profiles_there_are_no_snapshots(
    worker: Callable[..., Trainer], storage: ProjectFolder
) -> None:
    trainer = worker("trial", "training.steps=2")
    assert trainer.run()
    assert not trainer.setup.snapshots.published()
    SweepRecord(
        id="sweep",
        name="sweep",
        file="sweep.yaml",
        experiment=trainer.experiment.resolved(),
        trials=[TrialEntry("trial", {}, 2)],
        metric="eval/fd_nfe1",
        mode="min",
    ).save(storage)
    with pytest.raises(UserError, match=r"set training\.ema_profiles"):
        reconstruct(EmaRequest("sweep/trial", (0.1,)), storage)
