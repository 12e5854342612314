"""The plan of a sweep: its sums, its assumptions, and what it says does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from soflow_core.objectives import SoFlow
from soflow_platform.cli.plan import amount, amount_lines, as_record, plan_command, short_plan, space_note
from soflow_platform.cli.sweep_file import CheckedSweep, read
from soflow_platform.config.search import AshaConfig
from soflow_platform.errors import UserError
from soflow_platform.tuning.plan import SweepPlan, asha_share, plan_sweep
from soflow_platform.tuning.plan_assumptions import Assumptions
from tests.support.sweep_files import MINIMAL, write

PAPER = ("search={metric: eval/fid_nfe1}",)
"""One trial: the settings as they are written."""


def plan_of(sweep: CheckedSweep, **assumptions: object) -> SweepPlan:
    return plan_sweep(sweep.experiment, sweep.trials, Assumptions(**assumptions))  # type: ignore[arg-type]


def test_the_plan_of_xl2_is_that_of_the_scaling_page() -> None:
    """118.6 GMAC, 4.5 forward passes; 131.9 ms a step and 352 GPU-hours on 8 H100."""
    plan = plan_of(read("xl2", PAPER))
    (trial,) = plan.trials
    assert trial.parameters == 676_440_592
    assert trial.image_flops == pytest.approx(2 * 118.6e9 * 4.5, rel=1e-3)
    assert trial.total_flops == trial.image_flops * 256 * 1_200_000
    assert trial.step_seconds == pytest.approx(0.1319, abs=1e-4)
    training_hours = 8 * trial.steps * trial.step_seconds / 3600
    assert training_hours == pytest.approx(352, abs=1)
    assert plan.gpu_hours == pytest.approx(training_hours, rel=0.02)
    assert trial.checkpoint_bytes == trial.host_copy_bytes == pytest.approx(10.8e9, rel=0.01)
    assert trial.data_bytes == 18_432 * 256 * 1_200_000
    assert trial.network_bytes == pytest.approx(8 * 4.735e9 * 1_200_000, rel=1e-3)


def test_going_on_from_remote_parts_takes_the_memory_of_a_copy() -> None:
    """Files of a folder are mapped, and those of a small state go to the disk."""
    remote = "training.checkpoints=s3://bucket/runs"
    plan = plan_of(read("xl2", (remote, *PAPER)))
    assert plan.trials[0].resume_bytes == plan.trials[0].host_copy_bytes
    assert "; a trial that goes on reads 10.8 GB to that memory" in dict(amount_lines(plan))["checkpoints"]
    for other in (read("xl2", PAPER), read("digits", (remote,))):
        assert plan_of(other).trials[0].resume_bytes == 0
        assert "that goes on" not in dict(amount_lines(plan_of(other)))["checkpoints"]


def test_price_and_time_follow_what_is_assumed() -> None:
    sweep = read("b4", PAPER)
    one, half = plan_of(sweep, price=2.0), plan_of(sweep, price=2.0, utilization=0.2)
    assert one.price == 2 * one.gpu_hours
    assert one.days == pytest.approx(one.gpu_hours / 24)
    arithmetic = one.trials[0].step_flops / (0.4 * 989e12)
    assert half.trials[0].step_seconds - one.trials[0].step_seconds > arithmetic
    assert plan_of(sweep, gpu="a100").gpu_hours > 2 * one.gpu_hours


def test_trials_share_a_cluster_and_the_last_to_end_decides() -> None:
    sweep = read("b4", (*PAPER, "search.space={training.batch: [128, 128, 256]}"))
    short, also_short, long = (trial.hours for trial in plan_of(sweep).trials)
    assert short == also_short < long
    assert plan_of(sweep).days == pytest.approx((2 * short + long) / 24)
    # The third begins when the first ends.
    assert plan_of(sweep, gpus=2).days == pytest.approx((short + long) / 24)
    assert plan_of(sweep, gpus=3).days == pytest.approx(long / 24)
    assert "1 of 4 GPUs have nothing to do" in plan_of(sweep, gpus=4).notes[0]


def test_halving_leaves_the_steps_of_its_rungs() -> None:
    # 9 trials to 10, 3 of them to 30, 1 to 100: (9 * 10 + 3 * 20 + 70) / (9 * 100).
    assert asha_share(AshaConfig(first_rung=10, reduction=3), 100, 9) == pytest.approx(220 / 900)
    assert asha_share(AshaConfig(first_rung=100, reduction=3), 100, 9) == 1.0


def test_what_does_not_fit_is_said_with_what_to_do() -> None:
    alone = ("resources.workers=1", *PAPER)
    (note,) = plan_of(read("xl2", alone), gpu="l40s").notes
    assert "GB and an l40s has 43 GB for tensors: set training.accumulate to 8" in note
    fitting = read("xl2", ("training.accumulate=8", *alone))
    assert plan_of(fitting, gpu="l40s").notes == []
    large = ("network={patch: 2, hidden: 4096, depth: 40, heads: 32}", *alone)
    assert "set training.parallel to fsdp" in plan_of(read("xl2", large), gpu="l40s").notes[0]


def test_trials_that_come_from_results_are_named() -> None:
    sweep = read("b4", (*PAPER, "search.final={best: 2, seeds: 3}"))
    (note,) = plan_of(sweep).notes
    assert note.startswith("up to 6 more trials come from results (search.algorithm, search.final)")


def test_sharded_training_has_a_share_of_the_state_and_sends_more() -> None:
    whole, sharded = (
        plan_of(read("xl2", (*PAPER, f"training.parallel={kind}"))).trials[0] for kind in ("ddp", "fsdp")
    )
    assert sharded.memory.moments == whole.memory.moments / 8
    assert sharded.network_bytes == pytest.approx(3.5 * whole.network_bytes)


@pytest.mark.parametrize(
    ("assumptions", "message"),
    [
        ({"gpu": "v100"}, "--gpu v100 is not known: name one of a100, h100"),
        ({"utilization": 0.0}, "--utilization is 0: give a share above 0"),
        ({"gpus": 4}, "--gpus 4 is fewer than the 8 that one trial asks for"),
    ],
)
def test_an_assumption_that_cannot_be_is_refused(assumptions: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(read("xl2", PAPER), **assumptions)


def test_data_of_unknown_shape_are_refused(tmp_path: Path) -> None:
    sweep = read(str(write(tmp_path, MINIMAL.replace("source: digits", "source: s3://bucket/set"))), ())
    with pytest.raises(UserError, match=r"data.shape is not set, and the network's cost depends on it"):
        plan_of(sweep)


def test_the_short_form_has_time_only_where_gpus_are_asked_for() -> None:
    assert short_plan(plan_of(read("digits", ()))) == "4 trial(s), 21 TFLOP"
    short = short_plan(plan_of(read("xl2", ())))
    assert re.match(
        r"13 trial\(s\), 4.37 ZFLOP; 4,\d{3} GPU-hours, \d+ d .* USD, h100 at 40% of its peaks", short
    )


def test_kept_checkpoints_that_do_not_fit_on_the_disk_are_said() -> None:
    plan = plan_of(read("digits", ()))
    kept = round(sum(trial.kept_bytes for trial in plan.trials))
    assert space_note(plan, Path("runs"), kept) is None
    note = space_note(plan, Path("runs"), kept // 2)
    assert note is not None
    assert f"come to {amount(kept, 'B')}, and the disk of runs has {amount(kept // 2, 'B')} free" in note
    assert "training.keep_checkpoints" in note


def test_json_holds_what_the_table_shows(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = read("xl2", PAPER)
    plan_command(sweep, Assumptions("h200", 64), timed=True, as_json=True)
    record = json.loads(capsys.readouterr().out)
    plan = plan_of(sweep, gpu="h200", gpus=64)
    assert record == json.loads(json.dumps(as_record(plan)))
    assert record["gpu_hours"] == plan.gpu_hours
    assert record["assumptions"] == {
        "gpu": "h200",
        "gpus": 64,
        "utilization": 0.4,
        "price": 3.5,
        "currency": "USD",
    }
    plan_command(sweep, Assumptions("h200", 64), timed=True, as_json=False)
    shown = capsys.readouterr().out
    assert amount(plan.trials[0].total_flops, "FLOP") in shown
    assert "h200 at 40% of its peaks and 3.5 USD an hour" in shown


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (13.53e9, "13.5 GB"), (1.1e21, "1.1 ZB")]
)
def test_amounts_have_three_digits(value: float, text: str) -> None:
    assert amount(value, "B") == text


def test_a_method_whose_loss_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise KeyError(f"weights of {len(arguments)}")

    monkeypatch.setattr(SoFlow, "loss", broken)
    with pytest.raises(
        UserError, match=r"trial trial-00: the passes of soflow cannot be counted, because .*weights"
    ):
        plan_of(read("b4", PAPER))
