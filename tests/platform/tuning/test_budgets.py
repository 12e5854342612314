"""Budgets of equal steps and equal network evaluations, which are counted on the method itself."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from soflow_core.guidance import Guidance, VelocityGuidance
from soflow_core.nfe import LARGEST_COUNTED, sampling_evaluations, training_evaluations
from soflow_core.objectives import (
    OBJECTIVES,
    AlphaFlow,
    AlphaSchedule,
    ContinuousConsistency,
    Diffusion,
    EasyConsistency,
    ExplicitShortcut,
    FlowMatching,
    ImprovedConsistency,
    MeanFlow,
    Objective,
    Shortcut,
    SoFlow,
)
from soflow_platform.config.validation import read_experiment
from soflow_platform.errors import UserError
from soflow_platform.tuning.search_space import trials

ROOT = Path(__file__).parents[3]
METHODS = ROOT / "sweeps" / "methods-digits.yaml"
CIFAR10 = ROOT / "sweeps" / "methods-cifar10.yaml"
LATENTS = ROOT / "sweeps" / "methods-cifar10-latents.yaml"

# Forward and backward are 3, each pass without gradient is 1, a Jacobian-vector product is 2; all on a batch of 128.
TRAINING: list[tuple[Objective, float]] = [
    (FlowMatching(), 3),
    (Diffusion(), 3),
    (ImprovedConsistency(), 3 + 1),
    (EasyConsistency(), 3 + 1),
    (ContinuousConsistency(), 3 + 2),
    (SoFlow(guidance=Guidance(scale=1.0)), 3 + 0.25),
    (SoFlow(guidance=Guidance(mix=1.0)), 3 + 0.25 + 1),
    (SoFlow(), 3 + 0.25 + 1 + 0.25),
    (SoFlow(flow_matching_share=0.0, guidance=Guidance(scale=1.0)), 3 + 1),
    (MeanFlow(), 3 + 0.25 * 2),
    (MeanFlow(guidance=VelocityGuidance(omega=0.75, kappa=0.75)), 3 + 0.25 * 2 + 1 + 0.25),
    (ExplicitShortcut(), 3 + 0.25 * 2 + 1 + 0.25),
    (AlphaFlow(schedule=AlphaSchedule("constant", value=0.01)), 3 + 1 + 0.75 + 0.75),
    (AlphaFlow(schedule=AlphaSchedule("constant", value=0.0)), 3 + 1 + 0.75 + 0.75 * 2),
    (AlphaFlow(schedule=AlphaSchedule("constant", value=1.0)), 3 + 1 + 0.75),
    (Shortcut(scale=1.0), 3 + 0.125 * 2),
]


@pytest.mark.parametrize(("objective", "evaluations"), TRAINING)
def test_the_evaluations_of_a_training_sample_are_those_of_the_formulas(
    objective: Objective, evaluations: float
) -> None:
    assert training_evaluations(objective, 128) == evaluations


def test_a_method_that_compares_images_is_counted_in_any_batch() -> None:
    """All pairs of the images of such a batch would take 16 GiB."""
    assert training_evaluations(ExplicitShortcut(), LARGEST_COUNTED) == 3 + 0.25 * 2 + 1 + 0.25


def test_a_schedule_is_averaged_over_training() -> None:
    between = training_evaluations(AlphaFlow(), 128)
    assert 3 + 1 + 0.75 < between < 3 + 1 + 0.75 + 0.75 * 2


EACH_METHOD: list[Objective] = [method() for method in OBJECTIVES.values()]
SCHEDULES: list[Objective] = [
    AlphaFlow(schedule=AlphaSchedule("constant", value=0.5)),
    AlphaFlow(flow_matching_share=0.0),
    ImprovedConsistency(first_levels=2, last_levels=8),
    MeanFlow(derivative="finite_difference"),
    SoFlow(flow_matching_share=0.1),
]


@pytest.mark.parametrize("objective", [*EACH_METHOD, *SCHEDULES])
@pytest.mark.parametrize(("batch", "conditional"), [(1, True), (7, True), (24, False)])
def test_the_steps_of_a_phase_make_the_same_passes(
    objective: Objective, batch: int, conditional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = training_evaluations(objective, batch, conditional)
    monkeypatch.setattr(type(objective), "phase", Objective.phase)
    assert training_evaluations(objective, batch, conditional) == counted


def test_a_thousand_trials_are_planned_within_seconds() -> None:
    space = "{objective.weight_power: {uniform: [0, 1]}, optimizer.lr: {log_uniform: [1e-4, 1e-2]}}"
    experiment, document = read_experiment(
        ROOT / "sweeps" / "digits.yaml", (f"search={{algorithm: random, trials: 1000, space: {space}}}",)
    )
    begin = time.process_time()
    costs = [training_evaluations(p.experiment.objective, 128) for p in trials(document, experiment)]
    assert costs == [4.5] * 1000
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("method", sorted(OBJECTIVES))
def test_unguided_sampling_evaluates_once_for_each_step(method: str) -> None:
    objective = OBJECTIVES[method]()
    assert [sampling_evaluations(objective, steps) for steps in (1, 2, 4)] == [1, 2, 4]


def test_guidance_at_sampling_and_second_order_double_the_evaluations() -> None:
    assert sampling_evaluations(FlowMatching(sampler="heun"), 4) == 8
    assert sampling_evaluations(FlowMatching(sampling_scale=2.0), 4) == 8
    assert sampling_evaluations(FlowMatching(sampler="heun", sampling_scale=2.0), 4) == 16
    assert sampling_evaluations(FlowMatching(sampling_scale=2.0), 4, conditional=False) == 4
    assert sampling_evaluations(Diffusion(sampler="ddpm", sampling_scale=2.0), 50) == 100


def test_the_methods_sweep_has_equal_steps_and_equal_evaluations() -> None:
    experiment, document = read_experiment(METHODS)
    points = trials(document, experiment)
    for budget in ("steps", "evaluations"):
        trained = [p.experiment for p in points if budget in p.budgets]
        assert len(trained) == len(experiment.search.space["objective"])
        assert {e.objective.method for e in trained} <= set(OBJECTIVES)
        steps = [e.training.steps for e in trained]
        each = [training_evaluations(e.objective, e.training.batch) for e in trained]
        if budget == "steps":
            assert set(steps) == {600}
        else:
            # As near to 600 steps of SoFlow as whole steps are.
            for count, evaluations in zip(steps, each, strict=True):
                assert abs(count * evaluations - 600 * 4.5) <= evaluations / 2
    by_name = {p.name: p.budgets for p in points}
    assert by_name["trial-06-meanflow-omega=0.75-kappa=0.75-end=0.8-drop=0.1-equal-steps"] == ("steps",)
    assert by_name["trial-15-flow_matching-equal-evaluations"] == ("evaluations",)


def test_what_two_budgets_train_for_the_same_steps_is_trained_once() -> None:
    experiment, document = read_experiment(METHODS)
    points = trials(document, experiment)
    shared = [p for p in points if len(p.budgets) > 1]
    assert [(p.name, p.budgets, p.settings["budget"]) for p in shared] == [
        ("trial-00-soflow-scale=3-equal-steps", ("steps", "evaluations"), "steps, evaluations")
    ]
    # What is shared counts once.
    assert len(points) == 2 * len(experiment.search.space["objective"]) - 1


@pytest.mark.parametrize("budget", ["steps", "evaluations"])
def test_a_trial_knows_the_only_budget_of_its_sweep(budget: str) -> None:
    experiment, document = read_experiment(METHODS, (f"search.budgets=[{budget}]",))
    points = trials(document, experiment)
    assert {p.budgets for p in points} == {(budget,)}
    assert points[1].name == "trial-01-flow_matching"


def test_all_methods_of_the_sweep_share_everything_but_the_objective() -> None:
    experiment, document = read_experiment(METHODS)
    for point in trials(document, experiment):
        own = point.experiment.model_copy(update={"objective": None, "training": None})
        assert own == experiment.model_copy(update={"objective": None, "training": None})
        assert point.experiment.training.model_copy(update={"steps": 600}) == experiment.training


def test_cifar10_compares_the_methods_and_the_sampling_of_the_digits() -> None:
    digits, cifar = (trials(*reversed(read_experiment(path))) for path in (METHODS, CIFAR10))
    assert [p.name for p in cifar] == [p.name for p in digits]
    of_length = {
        "scm": ["warmup_steps"],
        "shortcut": ["teacher_ema"],
        "esc": ["zero_steps", "warmup_steps"],
    }
    for ours, theirs in zip(cifar, digits, strict=True):
        settings = of_length.get(ours.experiment.objective.method, [])
        known = {name: getattr(theirs.experiment.objective, name) for name in settings}
        assert replace(ours.experiment.objective, **known) == theirs.experiment.objective
    rows = [
        [row.model_copy(update={"samples": None}) for row in points[0].experiment.comparison]
        for points in (cifar, digits)
    ]
    assert rows[0] == rows[1]
    experiment = cifar[0].experiment
    assert (experiment.network.size, experiment.data.shape) == ("S/2", (3, 32, 32))
    assert (experiment.evaluation.features, experiment.evaluation.samples) == ("inception", 10_000)


@pytest.mark.parametrize("sweep", [METHODS, CIFAR10])
def test_guidance_of_the_methods_sweeps_is_matched(sweep: Path) -> None:
    experiment, document = read_experiment(sweep)
    objectives = [p.experiment.objective for p in trials(document, experiment)]
    unguided = {o.method for o in objectives if "guidance" in vars(o) and not o.guidance.active}
    assert unguided == {"soflow", "meanflow", "esc"}
    by_method = {o.method: o for o in reversed(objectives)}
    soflow = by_method["soflow"].guidance
    for method in ("meanflow", "esc", "alphaflow"):
        own = by_method[method].guidance
        assert (own.omega, own.kappa, own.end) == (
            soflow.mix * soflow.scale,
            1 - soflow.mix,
            soflow.decay_from,
        )
    assert by_method["shortcut"].scale == soflow.scale


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.budgets=[steps, steps]", "`budgets` names one twice"),
        ("search.budgets=[flops]", "input should be 'steps' or 'evaluations'"),
        ("search.asha={first_rung: 10}", "`asha` compares trials of one budget: name one in `budgets`"),
        ("evaluation.every=500", "evaluation.every (500) is beyond training.steps (491): lower it"),
        (
            "search.space={objective: [{method: meanflow, gidance: {omega: 1.0}}]}",
            "unknown key `gidance` in `objective`; did you mean `guidance`?",
        ),
    ],
)
def test_a_budget_that_cannot_be_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        trials(*reversed(read_experiment(METHODS, (override,))))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [METHODS, CIFAR10, LATENTS])
def test_the_tuned_files_give_every_method_a_search_of_equal_size(path: Path) -> None:
    rows = read_experiment(path)[0].search.space["objective"]
    experiment, document = read_experiment(path.with_name(f"{path.stem}-tuned.yaml"))
    planned = trials(document, experiment)
    counts = Counter(json.dumps(trial.settings["objective"]) for trial in planned)
    assert isinstance(rows, list)
    assert counts == {json.dumps(row): 3 for row in rows}
    usual = read_experiment(path)[0].optimizer.lr
    assert Counter(trial.settings["optimizer.lr"] for trial in planned)[usual] == len(planned) / 3
    # Three trials of each row with fresh seeds, which `compare` shows alone.
    assert experiment.search.added == 3 * len(rows)


def test_the_tuned_files_sample_alike_and_no_method_is_left_out() -> None:
    ways = [
        read_experiment(path.with_name(f"{path.stem}-tuned.yaml"))[0].comparison
        for path in (METHODS, CIFAR10, LATENTS)
    ]
    alike = [[row.model_copy(update={"samples": None}) for row in each] for each in ways]
    assert alike[0] == alike[1] == alike[2]
    methods = {row["method"] for row in read_experiment(METHODS)[0].search.space["objective"]}
    many = {method for method in methods for row in alike[0] if max(row.steps) >= 50 and row.covers(method)}
    assert many == methods
