"""The model of a step on GPUs: its messages in closed form, SoFlow's passes counted on its loss, and the tables of its document."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from soflow_core.networks import dit_config
from soflow_core.objectives import FlowMatching, MeanFlow, Objective, SoFlow
from soflow_core.passes import Precision
from soflow_platform.training.step_time import (
    Device,
    Fabric,
    Pass,
    Work,
    ddp_step,
    fsdp_messages,
    fsdp_step,
    work_of,
)

ROOT = Path(__file__).parents[3]
NETWORK = dit_config("S/8", channels=1, height=8, width=8, classes=10, null_label=True)

EXACT = Fabric("exact", inside=8.0, between=2.0, node=4, share=1.0, latency=0.0)
PLAIN = Work(parameters=100, forward_flops=6.0, passes=[Pass(1.0, gradient=True, bfloat16=True)])
UNIT = Device(bfloat16=1.0, tf32=0.5, memory=64.0, utilization=1.0, memory_share=1.0)


def passes(objective: Objective, precision: Precision) -> list[Pass]:
    """The passes of a method with one phase."""
    ((share, work),) = work_of(NETWORK, objective, precision)
    assert share == 1
    return work.passes


@pytest.mark.parametrize(
    ("ranks", "seconds"),
    [
        (1, 0.0),
        (2, 2 * 1 / 2 * 64 / 8),
        (4, 2 * 3 / 4 * 64 / 8),
        (8, 2 * 3 / 4 * 64 / 8 + 2 * 1 / 2 * 64 / 2),
        (16, 2 * 3 / 4 * 64 / 8 + 2 * 3 / 4 * 64 / 2),
    ],
)
def test_an_all_reduce_costs_two_gathers(ranks: int, seconds: float) -> None:
    """An all-reduce is a reduce-scatter and an all-gather over rings, inside nodes and between them."""
    assert EXACT.all_reduce(64, ranks) == seconds
    assert 2 * EXACT.gather(64, ranks) == seconds


def test_a_soflow_step_is_four_and_a_half_forward_passes() -> None:
    """Under the policy `mixed` one of them, the consistency pair, stays float32."""
    mixed = passes(SoFlow(), "mixed")
    assert sum(p.forwards for p in mixed) == sum(p.forwards for p in passes(SoFlow(), "float32")) == 4.5
    assert sum(p.forwards for p in mixed if not p.bfloat16) == 1.0
    assert [p.gradient for p in mixed] == [False, True, True, False]
    assert passes(FlowMatching(), "bfloat16") == [Pass(1.0, gradient=True, bfloat16=True)]


EXCHANGES: dict[Precision, tuple[int, int]] = {"float32": (4, 1), "mixed": (6, 1)}


def test_a_tangent_is_a_forward_pass_more() -> None:
    assert passes(MeanFlow(), "mixed")[-1] == Pass(0.25, gradient=False, bfloat16=False, tangent=True)
    assert sum(p.forwards for p in passes(MeanFlow(), "mixed")) == 3.5
    # Torch's forward mode multiplies by the zero tangents of the weights.
    assert sum(p.executed for p in passes(MeanFlow(), "mixed")) == 3.75


def test_fsdp_gathers_for_every_call_and_every_backward_pass() -> None:
    for precision, messages in EXCHANGES.items():
        assert fsdp_messages(Work(1, 1.0, passes(SoFlow(), precision))) == messages


def test_an_exchange_is_hidden_by_the_last_backward_pass() -> None:
    """Communication overlaps with the backward pass that completes the gradients and with nothing before it."""
    alone = ddp_step(PLAIN, UNIT, EXACT, ranks=1, batch=8)
    assert (alone.communication, alone.exposed, alone.efficiency) == (0.0, 0.0, 1.0)
    # 400 bytes are 100 s among the 4 ranks of a node; 2 rows hide 24 s and the gradients' way through memory 25 s.
    slow = Fabric("slow", inside=6.0, between=2.0, node=4, share=1.0, latency=0.0)
    assert ddp_step(PLAIN, UNIT, slow, ranks=4, batch=8).communication == 100.0
    many = Work(25 * 2**20 * 1000 // 4, 6.0, PLAIN.passes)
    step = ddp_step(many, UNIT, slow, ranks=4, batch=8)
    assert step.compute == 36.0
    hidden = (2 * 6 * 2 + 16 * many.parameters / 64) * (1 - 1 / 1000)
    assert step.exposed == pytest.approx(step.communication - hidden, rel=1e-12)


def test_splitting_over_a_node_sends_less_than_splitting_over_all() -> None:
    everywhere = fsdp_step(PLAIN, UNIT, EXACT, ranks=16, batch=16)
    in_nodes = fsdp_step(PLAIN, UNIT, EXACT, ranks=16, batch=16, shards=4)
    gather = EXACT.gather(400, 16)
    assert everywhere.communication == 3 * gather
    assert in_nodes.communication == 3 * EXACT.gather(400, 4) + EXACT.all_reduce_between(400, 16)
    assert fsdp_step(PLAIN, UNIT, EXACT, 4, 16, shards=4) == fsdp_step(PLAIN, UNIT, EXACT, 4, 16)


def test_the_document_holds_the_tables_that_the_program_prints() -> None:
    printed = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "scaling.py"], capture_output=True, text=True, check=True
    ).stdout
    document = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    tables = [line for line in printed.splitlines() if line and not line.startswith("##")]
    assert len(tables) > 30
    assert [line for line in tables if line not in document] == []
