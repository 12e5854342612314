"""How many trials a cluster holds: compared with every placement of their watchers, and what is said where none fits."""

from __future__ import annotations

import itertools
import random

import pytest

from soflow_platform.cluster.capacity import (
    Demand,
    Machine,
    concurrent_limit,
    why_not_one,
    workers_on,
)


def always_fits(machines: list[Machine], demand: Demand, trials: int) -> bool:
    """Whether so many trials can be placed however Ray spreads their watchers over the machines, by trying all."""
    for counts in itertools.product(range(trials + 1), repeat=len(machines)):
        if sum(counts) != trials:
            continue
        if any(
            count * demand.watcher > machine.cpus + 1e-9
            for count, machine in zip(counts, machines, strict=True)
        ):
            continue
        room = sum(
            workers_on(machine, demand, count) for machine, count in zip(machines, counts, strict=True)
        )
        if room < trials * demand.workers:
            return False
    return True


def test_no_placement_of_watchers_keeps_a_trial_out_and_one_trial_more_could_be() -> None:
    generator = random.Random(0)
    sizes = (0.0, 0.5, 1.0, 2.0, 3.1, 4.0)
    several = 0
    for _ in range(200):
        machines = [
            Machine(generator.choice(sizes), generator.choice((0, 1, 2)))
            for _ in range(generator.randint(1, 3))
        ]
        demand = Demand(
            generator.randint(1, 3),
            generator.choice((0.5, 1.0, 1.5, 2.0)),
            generator.choice((0, 0, 0.5, 1)),
            generator.choice((0.1, 0.4)),
        )
        limit = concurrent_limit(machines, demand)
        if limit > 1 or (limit == 1 and always_fits(machines, demand, 1)):
            several += limit > 1
            assert always_fits(machines, demand, limit), (machines, demand, limit)
        if limit > 0:
            assert not always_fits(machines, demand, limit + 1), (machines, demand, limit)
    assert several > 20


@pytest.mark.parametrize(
    ("machines", "demand", "limit"),
    [
        # Parts of a GPU are parts of one.
        ([Machine(8, 3)], Demand(1, 1, 0.7), 3),
        ([Machine(8, 1)], Demand(1, 1, 0.25), 4),
        ([Machine(8, 1), Machine(8, 1)], Demand(1, 1, 0.6), 2),
        # Eight workers on two nodes of four GPUs.
        ([Machine(16, 4), Machine(16, 4)], Demand(8, 4, 1, 0.1), 0),
        ([Machine(16.2, 4), Machine(16.2, 4)], Demand(8, 4, 1, 0.1), 1),
        # All the CPUs there are, and no worker of eight fits on nodes of four.
        ([Machine(4, 0), Machine(4, 0)], Demand(1, 8, 0), 0),
        # A watcher takes the place of one worker, and two are left.
        ([Machine(1, 0)] * 3, Demand(2, 1, 0, 0.1), 1),
        ([Machine(1, 0)] * 2, Demand(2, 1, 0, 0.1), 0),
        # Where the watcher goes decides: one trial is tried.
        ([Machine(0.5, 0), Machine(1, 0), Machine(1, 0)], Demand(2, 1, 0, 0.1), 1),
        ([Machine(3, 0)], Demand(2, 0.5, 0, 0.1), 2),
    ],
)
def test_what_fits(machines: list[Machine], demand: Demand, limit: int) -> None:
    assert concurrent_limit(machines, demand) == limit


def test_what_does_not_fit_is_said_with_what_there_is() -> None:
    assert why_not_one([Machine(4, 0), Machine(4, 0)], Demand(1, 8, 0)) == (
        "one trial asks for 8 CPU and 0 GPU (1 workers) and this Ray has 8 CPU and 0 GPU on 2 nodes (2 with 4 CPU and 0 GPU), "
        "none of which has room for a worker of 8 CPU and 0 GPU"
    )
    assert why_not_one([Machine(1, 0)] * 2, Demand(2, 1, 0, 0.1)).endswith(
        "(2 with 1 CPU and 0 GPU), where the process that watches the workers takes 0.1 CPU besides"
    )
