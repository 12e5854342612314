"""Compiled, distributed, reduced-precision and deterministic training, and methods with a teacher."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from soflow_core.alignment import Alignment
from soflow_core.gradient_sync import DDP, FlatAllReduce, GradientSync
from soflow_core.host_copy import map_tensors
from soflow_core.objectives import (
    Batch,
    ContinuousConsistency,
    Draws,
    ExplicitShortcut,
    MeanFlow,
    Objective,
    Shortcut,
    SoFlow,
)
from soflow_core.optimizer import OptimizerConfig
from soflow_core.passes import Precision
from soflow_core.train_step import TrainStep, TrainStepConfig
from tests.support.gloo_ranks import WORLD, rank_rows, run_ranks
from tests.support.random_networks import SHAPE, random_inputs, random_network

# The gradient of a key's bias is 0 but for rounding, which a smaller eps would turn into full steps.
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-4)


def make(
    objective: Objective, sync: GradientSync | None = None, aligned: bool = False, **settings: Any
) -> TrainStep:
    settings = {"ema_decays": (0.9,), "precision": "float32", **settings}
    config = TrainStepConfig(total_steps=10, optimizer=OPTIMIZER, **settings)
    alignment = Alignment(1.0, 1, channel_means, SHAPE[0]) if aligned else None
    return TrainStep(random_network(torch.float32), objective, config, sync, alignment)


def channel_means(x0: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, C): features to align with."""
    return x0.mean(dim=(2, 3))


def inputs(objective: Objective, step: int) -> tuple[Batch, Draws]:
    return random_inputs(objective, size=16, dtype=torch.float32, seed=step)


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses_and_compiles_once() -> None:
    """Losses agree to 2e-5 relative; the compiler works in the first step only."""
    objective = SoFlow()
    plain, compiled = make(objective), make(objective, compile=True)
    torch._dynamo.reset()
    counts = []
    for step in range(6):
        records = [train(*inputs(objective, step)) for train in (plain, compiled)]
        assert records[1].loss == pytest.approx(records[0].loss, rel=2e-5)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] > 0
    assert len(set(counts)) == 1, counts


@pytest.mark.slow
def test_every_pass_of_every_piece_is_compiled_in_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainings of one process, whose pieces of 9 and 3 or 21 and 7 rows are in part bfloat16, make more
    versions than torch compiles by default. A compiler that changes nothing will do here.
    """
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: whole(self, backend="eager", **kw))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = {"precision": "mixed", "accumulate": 2}
    graphs = []
    for size in (12, 28):
        plain, compiled = make(SoFlow(), **settings), make(SoFlow(), **settings, compile=True)
        for step in range(3):
            batch = random_inputs(plain.objective, size, torch.float32, seed=step)
            assert compiled(*batch).loss == pytest.approx(plain(*batch).loss, rel=1e-3)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # Guidance, velocity, consistency and F_l, each of two sizes.
    assert graphs == [8, 8, 8, 16, 16, 16]
    assert torch._dynamo.config.recompile_limit == 8


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_a_deterministic_run_is_bit_for_bit_the_same_twice(precision: Precision) -> None:
    runs = [make(SoFlow(), deterministic=True, precision=precision, accumulate=2) for _ in range(2)]
    records = [[train(*inputs(train.objective, k)) for k in range(3)] for train in runs]
    assert records[0] == records[1]
    states: list[list[torch.Tensor]] = [[], []]
    for train, tensors in zip(runs, states, strict=True):
        map_tensors(train.state_dict(), tensors.append)
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("refused", [True, False])
def test_only_deterministic_kernels_run_from_first_pass_to_update(deterministic: bool, refused: bool) -> None:
    train = make(SoFlow(), deterministic=deterministic)
    seen = []
    train.module.register_forward_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    train.parameters[0].register_hook(lambda _: seen.append(torch.are_deterministic_algorithms_enabled()))
    train.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.are_deterministic_algorithms_enabled())
    )
    batch, draws = inputs(train.objective, 0)
    batch.x0[0] *= float("nan") if refused else 1
    assert train(batch, draws).finite is not refused
    # Three passes, one gradient, and the update if there was one.
    assert seen == [deterministic] * (4 if refused else 5)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("precision", ["mixed", "bfloat16"])
def test_reduced_precision_keeps_float32_parameters_and_stays_near(precision: Precision) -> None:
    full, reduced = make(SoFlow()), make(SoFlow(), precision=precision)
    for step in range(3):
        a, b = (train(*inputs(train.objective, step)) for train in (full, reduced))
        assert b.finite
        assert b.terms["velocity_mse"] == pytest.approx(a.terms["velocity_mse"], rel=0.05)
    assert {p.dtype for p in reduced.parameters} == {torch.float32}


@pytest.mark.parametrize(("matrix_units", "expected"), [(True, "mixed"), (False, "float32")])
def test_auto_precision_is_mixed_only_where_bfloat16_is_fast(
    monkeypatch: pytest.MonkeyPatch, matrix_units: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units, raising=False)
    assert make(SoFlow(), precision="auto").policy.precision == expected


def test_a_teacher_is_the_ema_of_its_decay() -> None:
    train = make(Shortcut(teacher_ema=0.5))
    assert list(train.ema.averages) == ["0.9", "0.5"]
    train(*inputs(train.objective, 0))
    x, t = torch.randn(2, *SHAPE), torch.tensor([0.5, 1.0])
    averaged = random_network(torch.float32)
    averaged.load_state_dict(train.ema_state(0.5))
    with torch.no_grad():
        assert_close(train.policy.teacher(x, t, t - 0.25, None), averaged(x, t, t - 0.25, None))
        assert not torch.allclose(train.policy.teacher(x, t, t, None), train.module(x, t, t, None))


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [MeanFlow(), ContinuousConsistency(warmup_steps=1)], ids=["meanflow", "scm"]
)
def test_compiled_training_takes_its_jacobian_vector_product_uncompiled(objective: Objective) -> None:
    torch._dynamo.reset()
    plain, compiled = make(objective), make(objective, compile=True)
    for step in range(3):
        records = [train(*inputs(objective, step)) for train in (plain, compiled)]
        assert records[1].loss == pytest.approx(records[0].loss, rel=2e-5)


METHODS: dict[str, tuple[Objective, GradientSync, int]] = {
    "ddp": (SoFlow(), DDP(), 1),
    "flat": (SoFlow(), FlatAllReduce(), 1),
    "meanflow": (MeanFlow(), FlatAllReduce(), 1),
    "ddp in pieces": (SoFlow(), DDP(), 2),
    "ddp, difference quotient": (MeanFlow(derivative="finite_difference"), DDP(), 1),
    "images of all ranks, in pieces": (ExplicitShortcut(zero_steps=8, warmup_steps=8), FlatAllReduce(), 2),
    "aligned": (SoFlow(), FlatAllReduce(), 1),
}
"""Name -> objective, synchronization, pieces."""


class OneForgotten(FlatAllReduce):
    def reduce(self, gradients: list[torch.Tensor]) -> None:
        super().reduce(gradients[:3] + gradients[4:])


class LastBit(FlatAllReduce):
    def reduce(self, gradients: list[torch.Tensor]) -> None:
        super().reduce(gradients)
        if dist.get_rank() == 1:
            last = gradients[-1].view(-1)[-1:]
            last.copy_(torch.nextafter(last, last + 1))


class Order(FlatAllReduce):
    def reduce(self, gradients: list[torch.Tensor]) -> None:
        super().reduce(gradients)
        if dist.get_rank() == 0:
            gradients[0].view(-1)[:2] = gradients[0].view(-1)[:2].flip(0)


BROKEN: dict[str, tuple[GradientSync, str]] = {
    "one forgotten": (OneForgotten(), "the gradient of t_embedder.mlp.0.bias differs"),
    "last bit": (LastBit(), "the gradient of final_layer.adaLN_modulation.1.bias differs"),
    "order": (Order(), "the gradient of x_embedder.proj.weight differs"),
    "other weights": (
        FlatAllReduce(),
        "^s_embedder.mlp.2.weight differs between ranks; start all with the same weights",
    ),
}


def _two_ranks(rank: int, folder: str) -> None:
    _train_all_ways(rank, folder)
    torch.save(
        {name: _message(rank, name, sync) for name, (sync, _) in BROKEN.items()},
        f"{folder}/messages-{rank}.pt",
    )


def _message(rank: int, name: str, sync: GradientSync) -> str:
    """The error of MeanFlow's first step under a reduction that is broken, or from unlike weights."""
    train = make(MeanFlow(), sync)
    if name == "other weights" and rank == 1:
        train.module.s_embedder.mlp[2].weight.data[0, 0] += 1e-6
    with pytest.raises(RuntimeError) as raised:
        train(*rank_rows(inputs(train.objective, 0), rank))
    return str(raised.value)


def _train_all_ways(rank: int, folder: str) -> None:
    for method, (objective, sync, pieces) in METHODS.items():
        train = make(objective, sync, method == "aligned", accumulate=pieces)
        records: list[dict[str, Any]] = []
        messages: list[None] = []
        if isinstance(train.network, DistributedDataParallel):
            train.network.register_comm_hook(messages, _count)
        for step in range(4):
            batch, draws = rank_rows(inputs(objective, step), rank)
            if step == 3 and rank == 1:
                batch.x0[0] = float("nan")
            records.append(vars(train(batch, draws)))
        torch.save([train.state_dict(), records, len(messages)], f"{folder}/{method}-{rank}.pt")


def _count(messages: list[None], bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    messages.append(None)
    return allreduce_hook(dist.group.WORLD, bucket)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes made of every way to share a step."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_two_ranks, str(folder))
    return folder


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one_worker_and_stop_together(method: str, two_ranks: Path) -> None:
    alone = make(METHODS[method][0], aligned=method == "aligned")
    losses = [alone(*inputs(alone.objective, step)).loss for step in range(3)]
    saved = [torch.load(two_ranks / f"{method}-{r}.pt") for r in range(WORLD)]
    states, records, _ = zip(*saved, strict=True)
    for step in range(3):
        assert sum(r[step]["loss"] for r in records) / WORLD == pytest.approx(losses[step], rel=1e-4)
    assert [r[3]["finite"] for r in records] == [False, False]
    # Where images are compared every rank meets the one that is not finite.
    met = alone.objective.compares_images
    assert records[0][3]["culprit"] == ("velocity_mse" if met else "gradients of all parameters")
    assert records[1][3]["culprit"].endswith(("_loss", "_mse"))
    assert [s["step"] for s in states] == [3, 3]
    for name, tensor in states[0]["network"].items():
        assert torch.equal(tensor, states[1]["network"][name])
        assert_close(tensor, alone.module.state_dict()[name], rtol=1e-3, atol=2e-5)
    for name, tensor in states[0].get("alignment", {}).items():
        assert alone.alignment is not None
        assert torch.equal(tensor, states[1]["alignment"][name])
        assert_close(tensor, alone.alignment.head.state_dict()[name], rtol=1e-3, atol=2e-5)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", BROKEN)
def test_every_rank_names_the_first_parameter_of_a_broken_reduction(name: str, two_ranks: Path) -> None:
    """Right reductions pass: the first step of every way to share a step above was compared."""
    messages = [torch.load(two_ranks / f"messages-{rank}.pt")[name] for rank in range(WORLD)]
    assert messages[0] == messages[1]
    assert re.search(BROKEN[name][1], messages[0])


def test_pieces_are_exchanged_once_a_step(two_ranks: Path) -> None:
    counts = [torch.load(two_ranks / f"{method}-0.pt")[2] for method in ("ddp", "ddp in pieces")]
    assert counts[0] == counts[1] >= 4


def test_ddp_does_not_carry_a_jacobian_vector_product() -> None:
    with pytest.raises(ValueError, match="which DDP does not carry; use FlatAllReduce or FSDP"):
        make(MeanFlow(), DDP())
