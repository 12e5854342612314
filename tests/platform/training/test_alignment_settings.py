"""`training.alignment` in a trial: what it is checked for, what it changes, what it costs, and what the gate says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from soflow_core.failures import InputError
from soflow_pipelines.features.digits import DigitsClassifier
from soflow_pipelines.features.registry import FEATURES
from soflow_pipelines.preparation.builtin import BUILTIN
from soflow_platform.config.gate import GateConfig, GuardConfig
from soflow_platform.jobs.gate_scores import Contender, GateProtocol, training_flags
from soflow_platform.jobs.targets import EvaluationTarget
from soflow_platform.training.alignment_cost import alignment_cost, check_alignment
from soflow_platform.training.dataset import check_data
from soflow_platform.training.model import describe_network
from soflow_platform.training.step_time import feature_flops
from soflow_platform.training.worker import Trainer
from soflow_platform.tuning.plan import plan_trial
from soflow_platform.tuning.plan_assumptions import Assumptions
from soflow_platform.tuning.search_space import Trial
from tests.platform.conftest import small_experiment

ALIGNED = "training.alignment={weight: 0.5, features: digits-classifier, block: 1}"
POOLED = "training.alignment={weight: 0.5, features: pooled}"
SHORT = ("training.steps=2", "training.log_every=1")
OFF = "training.alignment={weight: 0, features: digits-classifier, block: 1}"


def test_a_trial_without_weight_has_the_bits_of_one_without_alignment(
    worker: Callable[..., Trainer],
) -> None:
    trainers = [worker("plain", *SHORT), worker("off", OFF, *SHORT), worker("aligned", POOLED, *SHORT)]
    for trainer in trainers:
        trainer.run()
    plain, off, aligned = (trainer.train_step.module.state_dict() for trainer in trainers)
    assert all(torch.equal(plain[name], off[name]) for name in plain)
    assert not all(torch.equal(plain[name], aligned[name]) for name in plain)
    (path,) = Path(trainers[2].setup.checkpoints.root).rglob("step-00000002/ema.safetensors")
    assert load_file(path).keys() == plain.keys()


def test_settings_that_change_nothing_are_no_part_of_a_digest() -> None:
    plain, off, aligned = (small_experiment(*more) for more in ((), (OFF,), (ALIGNED,)))
    assert "alignment" not in plain._training()["training"]
    assert plain.digest() == small_experiment("training.alignment.weight=0").digest()
    assert len({each.training_digest() for each in (plain, off, aligned)}) == 3
    space = small_experiment(ALIGNED, "search.space={training.alignment.weight: [0, 0.5]}").search.space
    assert "training.alignment.weight" in space


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("training.alignment.weight=1",), "`features` is not set: name a feature network"),
        (("training.alignment={weight: 1, features: nothing}",), "known are inception"),
        ((ALIGNED, "training.alignment.block=9"), "there is no block 9; this network has blocks 1 to 1"),
        ((ALIGNED, "network={kind: unet, base: 16}"), "a network of kind unet has no blocks"),
        ((ALIGNED, "training.parallel=fsdp", "resources.workers=2"), "set training.parallel to ddp"),
        ((ALIGNED, "data.source=.", "evaluation.features=pooled"), "describes data.source digits only"),
    ],
)
def test_what_does_not_fit_is_refused(settings: tuple[str, ...], message: str) -> None:
    def prepare() -> None:
        experiment = small_experiment(*settings)
        check_data(experiment)
        describe_network(experiment, BUILTIN["digits"])

    with pytest.raises(InputError, match=message):
        prepare()


def test_latents_are_aligned_with_features_of_the_training_space_alone() -> None:
    def fits(features: str, kind: str = "latents") -> None:
        alignment = f"training.alignment={{weight: 1, features: {features}}}"
        check_alignment(small_experiment("data.source=.", alignment), kind)

    fits("pooled")
    fits("inception", "pixels")
    for features in ("inception", "file:/net.pt2"):
        with pytest.raises(InputError, match="looks at images and the data are latents"):
            fits(features)


def test_the_cost_is_counted() -> None:
    experiment, plain = small_experiment(ALIGNED), small_experiment()
    network = describe_network(experiment, BUILTIN["digits"])
    cost = alignment_cost(experiment, network)
    # 4 tokens of width 16, hidden layers of 32, 64 features, forwards and backwards.
    head = 2 * 4 * (16 * 32 + 32 * 32 + 32 * 64)
    with FlopCounterMode(display=False) as counter:
        DigitsClassifier()(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    assert feature_flops("digits-classifier") == counter.get_total_flops()
    assert cost.image_flops == 3 * head + counter.get_total_flops()
    plans = [
        plan_trial(Trial(0, "trial", {}, each, ("steps",)), Assumptions()) for each in (experiment, plain)
    ]
    assert plans[0].image_flops - plans[1].image_flops == plans[0].alignment_flops == cost.image_flops
    assert plans[0].step_seconds > plans[1].step_seconds
    assert alignment_cost(plain, network).image_flops == 0
    assert plans[0].memory.gradients - plans[1].memory.gradients == 4 * cost.parameters
    file = small_experiment("training.alignment={weight: 1, features: 'file:net.pt2'}")
    assert not alignment_cost(file, network).counted


def test_declared_widths_are_those_of_the_networks() -> None:
    assert FEATURES["digits-classifier"].width == DigitsClassifier.dim
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    assert DigitsClassifier().patch_features(images).shape == (2, DigitsClassifier.dim, 4, 4)


def contender(label: str, **alignment: Any) -> Contender:
    return Contender(label, EvaluationTarget(label), {"training": {"alignment": alignment}})


def test_the_gate_flags_who_was_trained_on_its_features() -> None:
    guards = (GuardConfig(metric="fd", features="dinov2"),)
    protocol = GateProtocol(GateConfig(), "fd", "digits-classifier", 1, 100, "uniform", guards)
    older = Contender("older", EvaluationTarget("older"), {})
    flags = training_flags(
        [
            contender("candidate", weight=0.5, features="digits-classifier"),
            contender("champion", weight=1.0, features="dinov2"),
            contender("off", weight=0.0, features="digits-classifier"),
            contender("other", weight=1.0, features="pooled"),
            older,
            None,
        ],
        protocol,
        [],
    )
    assert [flag.split(" (")[0] for flag in flags] == [
        "candidate was trained on the features that decide here",
        "champion was trained on the features that guard here",
    ]
