"""How many trials can run at the same time on the machines of a cluster, so that none of them can keep another from starting.

Ray places a trial's workers as one group, whole or not at all, on any machines; before it the process that watches them (Tune's trial
actor), which takes a little of a CPU wherever there is room. Everything else that a sweep runs asks for no resources: the progress
actor, Ray Train's controllers and cleaners. Statistics of reference images are computed before the trials start. So trials can
block each other in one way alone: watchers take the place of workers. The count below holds wherever Ray puts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SLACK = 1e-9
"""Ray counts resources in steps of 0.0001; sums of floats differ by less."""


@dataclass(frozen=True)
class Machine:
    """What a node of a cluster has for trials."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Demand:
    """What one trial asks for."""

    workers: int
    cpus: float
    """Of each worker."""
    gpus: float
    """Of each worker; below 1 workers share a GPU, and Ray gives no worker parts of two."""
    watcher: float = 0.0
    """CPUs of the process that watches the workers; 0 where there is none."""

    def __str__(self) -> str:
        each = f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")
        return f"{self.workers} worker(s) of {each}"


def workers_on(machine: Machine, demand: Demand, watchers: int = 0) -> int:
    """Workers that fit on a machine beside some watchers."""
    fitting = math.floor((machine.cpus - watchers * demand.watcher) / demand.cpus + SLACK)
    if demand.gpus >= 1:
        fitting = min(fitting, math.floor(machine.gpus / demand.gpus + SLACK))
    elif demand.gpus > 0:
        # A worker's share is of one GPU: two GPUs have room for two workers of 0.6, and not for three.
        fitting = min(fitting, math.floor(machine.gpus + SLACK) * math.floor(1 / demand.gpus + SLACK))
    return max(0, fitting)


def concurrent_limit(machines: Sequence[Machine], demand: Demand) -> int:
    """The largest number of trials that can all run at once, wherever their watchers are placed.

    Where not even one trial is safe from its own watcher and yet fits beside it somewhere, 1.
    """
    room = sum(workers_on(machine, demand) for machine in machines)
    limit = room // demand.workers
    while limit > 0 and room - _lost_to_watchers(machines, demand, limit) < limit * demand.workers:
        limit -= 1
    return limit if limit > 0 else int(_fits_once(machines, demand))


def _lost_to_watchers(machines: Sequence[Machine], demand: Demand, watchers: int) -> int:
    """The most places of workers that so many watchers can take: those first that the fewest watchers take."""
    if demand.watcher == 0:
        return 0
    prices = sorted(price for machine in machines for price in _prices(machine, demand, watchers))
    lost = 0
    for price in prices:
        watchers -= price
        if watchers < 0:
            break
        lost += 1
    return lost


def _prices(machine: Machine, demand: Demand, most: int) -> list[int]:
    """How many watchers take the machine's first place of a worker, how many more the second, and so on."""
    prices: list[int] = []
    places, since = workers_on(machine, demand), 0
    for watchers in range(1, most + 1):
        if watchers * demand.watcher > machine.cpus + SLACK:
            break
        left = workers_on(machine, demand, watchers)
        if left < places:
            prices += [watchers - since] + [0] * (places - left - 1)
            places, since = left, watchers
    return prices


def _fits_once(machines: Sequence[Machine], demand: Demand) -> bool:
    """Whether one trial fits where its watcher is placed best."""
    room = sum(workers_on(machine, demand) for machine in machines)
    if demand.watcher == 0:
        return room >= demand.workers
    return any(
        machine.cpus + SLACK >= demand.watcher
        and room - workers_on(machine, demand) + workers_on(machine, demand, 1) >= demand.workers
        for machine in machines
    )


def why_not_one(machines: Sequence[Machine], demand: Demand) -> str:
    """What keeps a trial from being placed, with what the machines have."""
    cpus, gpus = sum(machine.cpus for machine in machines), sum(machine.gpus for machine in machines)
    has = f"this Ray has {cpus:g} CPU and {gpus:g} GPU"
    if len(machines) > 1:
        kinds = dict.fromkeys(machines)
        nodes = ", ".join(
            f"{machines.count(kind)} with {kind.cpus:g} CPU and {kind.gpus:g} GPU" for kind in kinds
        )
        has += f" on {len(machines)} nodes ({nodes})"
    total = f"{demand.workers * demand.cpus:g} CPU and {demand.workers * demand.gpus:g} GPU ({demand.workers} workers)"
    text = f"one trial asks for {total} and {has}"
    if not any(workers_on(machine, demand) for machine in machines) and len(machines) > 1:
        return f"{text}, none of which has room for a worker of {demand.cpus:g} CPU and {demand.gpus:g} GPU"
    if demand.watcher and cpus + SLACK >= demand.workers * demand.cpus:
        return f"{text}, where the process that watches the workers takes {demand.watcher:g} CPU besides"
    return text
