"""Asks every node of a Ray cluster for its report, and lets the nodes add up numbers with each other as training does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from soflow_core.failures import summarize
from soflow_platform.jobs.node_report import NodeQuestions, NodeReport, report_node

ANSWER_SECONDS = 180.0
"""A node imports torch, and fetches the code, before it answers."""
JOIN_SECONDS = 120.0
COLLECTIVE_SECONDS = 90.0
COLLECTIVE_MEGABYTES = 64
SEE_ALL_GPUS = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
"""A task that asks for no GPU sees those of its node all the same."""


@dataclass(frozen=True)
class NodeAnswer:
    """The report of a node, or why there is none."""

    name: str
    report: NodeReport | None
    failure: str | None = None
    skew: float = 0.0
    """Seconds by which the node's clock is ahead of this machine's, at least; negative where it is behind."""


@dataclass(frozen=True)
class Collective:
    """How a sum over all nodes went."""

    backend: str
    nodes: int
    gigabytes_per_second: float = 0.0
    failure: str | None = None
    skipped: str | None = None
    """Why it was not tried."""


def clock_skew(clock: float, asked: float, answered: float) -> float:
    """Seconds that a clock is ahead (positive) or behind at least, which was read between two readings of this machine's clock."""
    return clock - answered if clock > answered else min(0.0, clock - asked)


def wait_for_nodes(count: int) -> None:
    """Return when the cluster has so many living nodes, or after JOIN_SECONDS."""
    import ray

    end = time.monotonic() + JOIN_SECONDS
    while sum(node["Alive"] for node in ray.nodes()) < count and time.monotonic() < end:
        time.sleep(0.5)


def survey(questions: NodeQuestions) -> list[NodeAnswer]:
    """The answers of all living nodes, within ANSWER_SECONDS, by name. The process must be connected to Ray."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {name: node for name, node in _names(ray.nodes()).items() if node["Alive"]}

    def on(node: str) -> dict[str, Any]:
        strategy = NodeAffinitySchedulingStrategy(nodes[node]["NodeID"], soft=False)
        # A report takes no share of what trials hold.
        return {"num_cpus": 0, "max_retries": 0, "runtime_env": SEE_ALL_GPUS, "scheduling_strategy": strategy}

    pending = {ray.remote(report_node).options(**on(name)).remote(questions, name): name for name in nodes}
    answers, end = [], time.monotonic() + ANSWER_SECONDS
    while pending and time.monotonic() < end:
        done, _ = ray.wait(list(pending), timeout=max(0.0, end - time.monotonic()))
        for reference in done:
            name = pending.pop(reference)
            try:
                report = ray.get(reference)
                # The process that reported is there still, so that this takes milliseconds.
                asked = time.time()
                clock = ray.get(ray.remote(read_clock).options(**on(name)).remote(), timeout=ANSWER_SECONDS)
            except Exception as error:
                answers.append(NodeAnswer(name, None, summarize(error)))
            else:
                answers.append(NodeAnswer(name, report, skew=clock_skew(clock, asked, time.time())))
    answers += [
        NodeAnswer(name, None, f"it gave no answer within {ANSWER_SECONDS:g} s") for name in pending.values()
    ]
    return sorted(answers, key=lambda answer: answer.name)


def read_clock() -> float:
    """Seconds since the epoch on the node that runs this."""
    return time.time()


def _names(nodes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Names for nodes: their addresses, with the beginning of the node's id where several nodes have one address."""
    addresses = [node["NodeManagerAddress"] for node in nodes if node["Alive"]]
    return {
        node["NodeManagerAddress"]
        if addresses.count(node["NodeManagerAddress"]) == 1
        else f"{node['NodeManagerAddress']}-{node['NodeID'][:6]}": node
        for node in nodes
    }


class Rank:
    """One rank of a process group that spans the nodes; an actor."""

    def __init__(self, rank: int, ranks: int, backend: str) -> None:
        self._rank, self._ranks, self._backend = rank, ranks, backend

    def meeting_point(self) -> str:
        """`tcp://ADDRESS:PORT` of this node, for rank 0."""
        import socket

        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def add_up(self, meeting_point: str) -> float:
        """GB/s at which all ranks add up a tensor of COLLECTIVE_MEGABYTES. Raises RuntimeError where the sum is wrong."""
        import datetime

        import torch
        from torch import distributed

        device = "cuda" if self._backend == "nccl" else "cpu"
        timeout = datetime.timedelta(seconds=COLLECTIVE_SECONDS / 2)
        distributed.init_process_group(
            self._backend, init_method=meeting_point, rank=self._rank, world_size=self._ranks, timeout=timeout
        )
        try:
            distributed.all_reduce(torch.ones(1, device=device))
            numbers = torch.full((COLLECTIVE_MEGABYTES << 18,), float(self._rank + 1), device=device)
            start = time.perf_counter()
            distributed.all_reduce(numbers)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            expected = self._ranks * (self._ranks + 1) / 2
            if not bool((numbers == expected).all()):
                raise RuntimeError(
                    f"the sum over {self._ranks} nodes is {float(numbers[0]):g} and not {expected:g}"
                )
            return COLLECTIVE_MEGABYTES / 1024 / seconds
        finally:
            distributed.destroy_process_group()


def add_up_between_nodes() -> Collective:
    """Sum over one process on each node: NCCL on the nodes with GPUs where there are any, else Gloo on those with CPUs."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    gpu_nodes = [node for node in alive if node["Resources"].get("GPU", 0) >= 1]
    backend = "nccl" if gpu_nodes else "gloo"
    nodes = gpu_nodes or [node for node in alive if node["Resources"].get("CPU", 0) > 0]
    if len(nodes) < 2:
        return Collective(backend, len(nodes), skipped="one node trains: nothing is sent between nodes")
    actors = [
        ray.remote(Rank)
        .options(
            num_cpus=0,
            num_gpus=1 if backend == "nccl" else 0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        .remote(rank, len(nodes), backend)
        for rank, node in enumerate(nodes)
    ]
    try:
        meeting_points = [actor.meeting_point.remote() for actor in actors]
        _, waiting = ray.wait(meeting_points, num_returns=len(actors), timeout=COLLECTIVE_SECONDS)
        if waiting:
            return Collective(
                backend,
                len(nodes),
                skipped=f"{len(waiting)} of {len(nodes)} nodes had no GPU free: try again when they have",
            )
        point = ray.get(meeting_points[0])
        rates = ray.get([actor.add_up.remote(point) for actor in actors], timeout=COLLECTIVE_SECONDS)
        return Collective(backend, len(nodes), gigabytes_per_second=min(rates))
    except Exception as error:
        return Collective(backend, len(nodes), failure=summarize(error))
    finally:
        for actor in actors:
            ray.kill(actor)
