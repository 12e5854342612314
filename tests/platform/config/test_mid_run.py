"""Settings that change in mid-run: which may, what is refused, and what a step is trained with."""

from __future__ import annotations

from pathlib import Path

import pytest

from soflow_core.objectives import OBJECTIVES, Diffusion, ImprovedConsistency, Shortcut, SoFlow
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.mid_run import may_change
from soflow_platform.config.validation import read_experiment
from soflow_platform.errors import UserError
from soflow_platform.tuning.search_space import trials
from tests.support.sweep_files import MINIMAL, write

PBT = "search={algorithm: random, trials: 4, space: {optimizer.lr: {log_uniform: [1e-4, 1e-2]}}, pbt: {every: 20}}"


def checked(folder: Path, *overrides: str) -> Experiment:
    """The experiment of the small file, with its trials checked too."""
    experiment, document = read_experiment(write(folder, MINIMAL), overrides)
    trials(document, experiment)
    return experiment


@pytest.mark.parametrize(
    "key",
    [
        "objective.weight_power",
        "objective.flow_matching_share",
        "objective.times.start.mean",
        "objective.guidance.mix",
        "objective.schedule.initial",
        "objective.schedule.kind",
        "optimizer.lr",
        "optimizer.final_lr",
    ],
)
def test_loss_weights_times_schedules_and_learning_rate_may_change(key: str) -> None:
    assert may_change(SoFlow(), key)


@pytest.mark.parametrize(
    ("method", "key"),
    [
        (SoFlow, "objective"),
        (SoFlow, "objective.method"),
        (SoFlow, "objective.path"),
        (SoFlow, "objective.parameterization"),
        (SoFlow, "objective.times"),
        (SoFlow, "objective.times.start"),
        (SoFlow, "objective.sampler"),
        (SoFlow, "objective.sampling_scale"),
        (SoFlow, "objective.nothing"),
        (SoFlow, "optimizer.betas"),
        (SoFlow, "optimizer.warmup_steps"),
        (SoFlow, "network.depth"),
        (SoFlow, "training.batch"),
        (SoFlow, "training.steps"),
        (SoFlow, "data.source"),
        (SoFlow, "seed"),
        (Diffusion, "objective.beta_last"),
        (Diffusion, "objective.diffusion_steps"),
        (ImprovedConsistency, "objective.sigma_max"),
        (Shortcut, "objective.teacher_ema"),
    ],
)
def test_everything_else_stays(method: type, key: str) -> None:
    assert not may_change(method(), key)


def test_fixed_settings_are_settings_of_their_method() -> None:
    for name, method in OBJECTIVES.items():
        unknown = method.fixed_settings - set(method.__dataclass_fields__)
        assert not unknown, (name, unknown)


def test_a_step_has_the_settings_of_the_changes_before_it(tmp_path: Path) -> None:
    experiment = checked(
        tmp_path,
        "training.changes=[{after: 10, settings: {objective.weight_power: 0.5, optimizer.lr: 5e-4}}, "
        "{after: 20, settings: {objective.schedule.final: 0.01}}]",
    )
    seen = [
        (step, at.objective.weight_power, at.optimizer.lr, at.objective.schedule.final)
        for step in (1, 10, 11, 20, 21, 40)
        for at in [experiment.at(step)]
    ]
    before, between, last = (1.0, 1e-4, 0.002), (0.5, 5e-4, 0.002), (0.5, 5e-4, 0.01)
    assert seen == [(1, *before), (10, *before), (11, *between), (20, *between), (21, *last), (40, *last)]
    assert experiment.at(40).training.changes == ()
    assert experiment.sampled_objective == experiment.at(40).objective
    assert Experiment(**experiment.resolved()) == experiment


def test_changes_make_other_weights_and_none_change_no_digest(tmp_path: Path) -> None:
    plain = checked(tmp_path)
    changed = checked(tmp_path, "training.changes=[{after: 10, settings: {optimizer.lr: 5e-4}}]")
    assert plain.training_digest() != changed.training_digest()
    assert "changes" not in plain._training()["training"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.changes=[{after: 40, settings: {optimizer.lr: 1e-3}}]", "the training ends at step 40"),
        (
            "training.changes=[{after: 20, settings: {optimizer.lr: 1e-3}}, {after: 20, settings: {optimizer.lr: 1e-4}}]",
            "list them in order",
        ),
        ("training.changes=[{after: 20, settings: {training.batch: 8}}]", "`training.batch`, which stays"),
        ("training.changes=[{after: 20, settings: {optimizer.lr: -1}}]", "optimizer.lr is -1"),
        (
            "training.changes=[{after: 20, settings: {objective.guidance.scale: 1.0, objective.guidance.drop: 0}}]",
            r"are built for \(needs_null_label\)",
        ),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked(tmp_path, override)


def test_what_workers_exchange_stays(tmp_path: Path) -> None:
    stops = "training.changes=[{after: 20, settings: {objective.plug_in_share: 0.0}}]"
    with pytest.raises(UserError, match=r"are built for \(compares_images\)"):
        checked(tmp_path, "objective={method: esc}", stops)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.space={network.depth: [1, 2], optimizer.lr: [1e-4, 1e-3]}", "`network.depth` stays"),
        ("search.space={seed: [1, 2]}", "`seed` stays"),
        ("search.first=[{training.batch: 8}]", "`training.batch` stays"),
        ("search.pbt.every=10", "no multiple of evaluation.every"),
        ("search.pbt.every=40", "where nothing is left to train"),
        ("search.pbt.every=60", "beyond training.steps"),
        ("search.pbt.metric=eval/kid_nfe1", "search.pbt.metric 'eval/kid_nfe1' is never reported"),
        ("search.asha={first_rung: 20}", "keep one"),
        ("search.seeds=2", "one population of one seed"),
        ("search.final={}", "one population of one seed"),
        ("search.trials=1", "a population of 2 trials or more"),
        ("search.algorithm=tpe", "begins with its whole population"),
        (
            "search.space={optimizer.lr: {uniform: [1e-4, 1e-3], when: {seed: 1}}}",
            "leave `when` of `optimizer.lr` out",
        ),
        ("training.ema_profiles=[0.05]", "without the snapshots"),
        ("training.changes=[{after: 20, settings: {optimizer.lr: 1e-3}}]", "leave training.changes out"),
    ],
)
def test_a_population_that_cannot_be_trained_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked(tmp_path, PBT, override)


def test_a_population_is_another_sweep_and_scored_otherwise(tmp_path: Path) -> None:
    population = checked(tmp_path, PBT)
    without = checked(tmp_path, PBT, "search.pbt=!drop")
    assert population.digest() != without.digest()
    assert population.scoring_digest() != without.scoring_digest()
    assert population.rung_metric == ("eval/fd_nfe1", "min")
    assert checked(tmp_path, PBT, "search.pbt.metric=eval/fd_nfe2").rung_metric == ("eval/fd_nfe2", "min")
