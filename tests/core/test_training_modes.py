"""Compiled, distributed, reduced-precision and deterministic training, and methods with a teacher."""

import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from random_networks import SHAPE, random_inputs, random_network
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from soflow_core.objectives import Batch, Draws, MeanFlow, Objective, Shortcut, SoFlow
from soflow_core.training import OptimizerConfig, TrainStep

WORLD = 2
# The gradient of a key's bias is 0 but for rounding, which a smaller eps would turn into full steps.
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-4)


def make(objective: Objective, **settings) -> TrainStep:
    network = random_network(torch.float32)
    settings = {"total_steps": 10, "ema_decays": (0.9,), **settings}
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


def test_float32_is_bit_for_bit_the_same_twice():
    first, second = make(SoFlow(), deterministic=True), make(SoFlow(), deterministic=True)
    losses = [[train(*inputs(train.objective, k)).loss for k in range(3)] for train in (first, second)]
    assert losses[0] == losses[1]
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


def test_what_a_jacobian_vector_product_does_not_go_with_is_refused():
    with pytest.raises(ValueError, match="compile=False"):
        make(MeanFlow(), compile=True)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _average(gradients):
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient /= WORLD


METHODS = ["ddp", "reduce", "meanflow"]


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    for method in METHODS:
        objective: Objective = SoFlow() if method != "meanflow" else MeanFlow()
        network = random_network(torch.float32)
        wrapped = DistributedDataParallel(network) if method == "ddp" else network
        reduce = None if method == "ddp" else _average
        train = TrainStep(wrapped, objective, OPTIMIZER, 10, (0.9,), reduce_gradients=reduce)
        records = []
        for step in range(4):
            batch, draws = inputs(objective, step)
            batch = Batch(batch.x0[rank::WORLD], batch.labels[rank::WORLD])
            if step == 3 and rank == 1:
                batch.x0[0] = float("nan")
            records.append(vars(train(batch, draws.rows(rank, WORLD))))
        torch.save([train.state_dict(), records], f"{folder}/{method}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A folder with what two processes made of every way to share a step."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (_free_port(), str(folder)), nprocs=WORLD)
    return folder


@pytest.mark.timeout(120)
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one_worker_and_stop_together(method, two_ranks):
    alone = make(SoFlow() if method != "meanflow" else MeanFlow())
    losses = [alone(*inputs(alone.objective, step)).loss for step in range(3)]
    states, records = zip(*(torch.load(two_ranks / f"{method}-{r}.pt") for r in range(WORLD)), strict=True)
    for step in range(3):
        assert sum(r[step]["loss"] for r in records) / WORLD == pytest.approx(losses[step], rel=1e-4)
    assert [r[3]["finite"] for r in records] == [False, False]
    assert records[0][3]["culprit"] == "gradients of all parameters"
    assert records[1][3]["culprit"].endswith(("_loss", "_mse"))
    assert [s["step"] for s in states] == [3, 3]
    for name, tensor in states[0]["network"].items():
        assert torch.equal(tensor, states[1]["network"][name])
        assert_close(tensor, alone.module.state_dict()[name], rtol=1e-3, atol=2e-5)


def test_ddp_does_not_carry_a_jacobian_vector_product():
    class Wrapped(DistributedDataParallel):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.module = random_network(torch.float32)

    with pytest.raises(ValueError, match="pass the plain network and reduce_gradients"):
        TrainStep(Wrapped(), MeanFlow(), OptimizerConfig(), 10)
