"""Compiled, distributed, reduced-precision and deterministic training, and methods with a teacher."""

import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from soflow_core.host_copy import map_tensors
from soflow_core.objectives import (
    Batch,
    ContinuousConsistency,
    Draws,
    MeanFlow,
    Objective,
    Shortcut,
    SoFlow,
)
from soflow_core.optimizer import OptimizerConfig
from soflow_core.train_step import TrainStep
from tests.support.gloo_ranks import WORLD, average, gather, rank_rows, run_ranks
from tests.support.random_networks import SHAPE, random_inputs, random_network

# The gradient of a key's bias is 0 but for rounding, which a smaller eps would turn into full steps.
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-4)


def make(objective: Objective, **settings) -> TrainStep:
    network = random_network(torch.float32)
    settings = {"total_steps": 10, "ema_decays": (0.9,), "precision": "float32", **settings}
    return TrainStep(network, objective, OPTIMIZER, **settings)


def inputs(objective: Objective, step: int) -> tuple[Batch, Draws]:
    return random_inputs(objective, size=16, dtype=torch.float32, seed=step)


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses_and_does_not_compile_again():
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
def test_every_pass_of_every_piece_is_compiled_in_the_first_step_and_only_there(monkeypatch):
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
def test_a_deterministic_run_is_bit_for_bit_the_same_twice(precision):
    runs = [make(SoFlow(), deterministic=True, precision=precision, accumulate=2) for _ in range(2)]
    records = [[train(*inputs(train.objective, k)) for k in range(3)] for train in runs]
    assert records[0] == records[1]
    states: list[list[torch.Tensor]] = [[], []]
    for train, tensors in zip(runs, states, strict=True):
        map_tensors(train.state_dict(), tensors.append)
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("refused", [True, False])
def test_deterministic_kernels_alone_run_from_the_first_pass_to_the_update_and_not_after(
    deterministic, refused
):
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
def test_reduced_precision_keeps_float32_parameters_and_stays_near(precision):
    full, reduced = make(SoFlow()), make(SoFlow(), precision=precision)
    for step in range(3):
        a, b = (train(*inputs(train.objective, step)) for train in (full, reduced))
        assert b.finite
        assert b.terms["velocity_mse"] == pytest.approx(a.terms["velocity_mse"], rel=0.05)
    assert {p.dtype for p in reduced.parameters} == {torch.float32}


@pytest.mark.parametrize(("matrix_units", "expected"), [(True, "mixed"), (False, "float32")])
def test_auto_precision_is_mixed_only_where_bfloat16_is_fast(monkeypatch, matrix_units, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_units, raising=False)
    assert make(SoFlow(), precision="auto").policy.precision == expected


def test_a_teacher_is_the_ema_of_its_decay():
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
def test_compiled_training_takes_its_jacobian_vector_product_uncompiled(objective):
    torch._dynamo.reset()
    plain, compiled = make(objective), make(objective, compile=True)
    for step in range(3):
        records = [train(*inputs(objective, step)) for train in (plain, compiled)]
        assert records[1].loss == pytest.approx(records[0].loss, rel=2e-5)


METHODS = ["ddp", "reduce", "meanflow", "ddp in pieces"]


def _forgets_one(gradients: list[torch.Tensor]) -> None:
    average(gradients[:3] + gradients[4:])


def _ends_one_bit_apart(gradients: list[torch.Tensor]) -> None:
    average(gradients)
    if dist.get_rank() == 1:
        last = gradients[-1].view(-1)[-1:]
        last.copy_(torch.nextafter(last, last + 1))


def _swaps_two_elements(gradients: list[torch.Tensor]) -> None:
    average(gradients)
    if dist.get_rank() == 0:
        gradients[0].view(-1)[:2] = gradients[0].view(-1)[:2].flip(0)


BROKEN = {
    "one forgotten": (_forgets_one, "the gradient of t_embedder.mlp.0.bias differs"),
    "last bit": (_ends_one_bit_apart, "the gradient of final_layer.adaLN_modulation.1.bias differs"),
    "order": (_swaps_two_elements, "the gradient of x_embedder.proj.weight differs"),
    "other weights": (
        average,
        "^s_embedder.mlp.2.weight differs between ranks; start all with the same weights",
    ),
}


def _two_ranks(rank: int, folder: str) -> None:
    _train_all_ways(rank, folder)
    torch.save(
        {name: _told(rank, name, reduction) for name, (reduction, _) in BROKEN.items()},
        f"{folder}/told-{rank}.pt",
    )


def _told(rank: int, name: str, reduction) -> str:
    """What the first step of MeanFlow says of a reduction that is broken, or of ranks that start apart."""
    train = make(MeanFlow(), reduce_gradients=reduction, gather=gather)
    if name == "other weights" and rank == 1:
        train.module.s_embedder.mlp[2].weight.data[0, 0] += 1e-6
    with pytest.raises(RuntimeError) as told:
        train(*rank_rows(inputs(train.objective, 0), rank))
    return str(told.value)


def _train_all_ways(rank: int, folder: str) -> None:
    for method in METHODS:
        objective: Objective = SoFlow() if method != "meanflow" else MeanFlow()
        network = random_network(torch.float32)
        wrapped = DistributedDataParallel(network) if method.startswith("ddp") else network
        exchange = {} if method.startswith("ddp") else {"reduce_gradients": average}
        pieces = 2 if method.endswith("pieces") else 1
        train = TrainStep(
            wrapped, objective, OPTIMIZER, 10, (0.9,), "float32", accumulate=pieces, gather=gather, **exchange
        )
        records, messages = [], []
        if method.startswith("ddp"):
            wrapped.register_comm_hook(messages, _count)
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
def two_ranks(tmp_path_factory):
    """A folder with what two processes made of every way to share a step."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_two_ranks, str(folder))
    return folder


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one_worker_and_stop_together(method, two_ranks):
    alone = make(SoFlow() if method != "meanflow" else MeanFlow())
    losses = [alone(*inputs(alone.objective, step)).loss for step in range(3)]
    saved = [torch.load(two_ranks / f"{method}-{r}.pt") for r in range(WORLD)]
    states, records, _ = zip(*saved, strict=True)
    for step in range(3):
        assert sum(r[step]["loss"] for r in records) / WORLD == pytest.approx(losses[step], rel=1e-4)
    assert [r[3]["finite"] for r in records] == [False, False]
    assert records[0][3]["culprit"] == "gradients of all parameters"
    assert records[1][3]["culprit"].endswith(("_loss", "_mse"))
    assert [s["step"] for s in states] == [3, 3]
    for name, tensor in states[0]["network"].items():
        assert torch.equal(tensor, states[1]["network"][name])
        assert_close(tensor, alone.module.state_dict()[name], rtol=1e-3, atol=2e-5)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_reduction_is_told_on_every_rank_with_the_first_parameter(name, two_ranks):
    """A right one passes: every way to share a step above was compared in its first step."""
    told = [torch.load(two_ranks / f"told-{rank}.pt")[name] for rank in range(WORLD)]
    assert told[0] == told[1]
    assert re.search(BROKEN[name][1], told[0])


def test_pieces_are_exchanged_once_a_step(two_ranks):
    counts = [torch.load(two_ranks / f"{method}-0.pt")[2] for method in ("ddp", "ddp in pieces")]
    assert counts[0] == counts[1] >= 4


def test_ddp_does_not_carry_a_jacobian_vector_product():
    class Wrapped(DistributedDataParallel):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.module = random_network(torch.float32)

    with pytest.raises(ValueError, match="pass the plain network and reduce_gradients"):
        TrainStep(Wrapped(), MeanFlow(), OptimizerConfig(), 10)
