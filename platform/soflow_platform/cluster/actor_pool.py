"""Tasks spread over actors of a Ray cluster: every actor kept busy, the tasks of a lost one given to another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from soflow_core.failures import summarize
from soflow_platform.cluster.connection import Cluster
from soflow_platform.errors import JobError

TaskT = TypeVar("TaskT")

MAX_ATTEMPTS = 3
THREADS_PER_GPU = 8
POLL_SECONDS = 0.5
HEALTH_CHECK_SECONDS = 5.0
"""How often it is looked whether Ray is alive."""


@dataclass(frozen=True)
class Share:
    """What each actor gets of the cluster."""

    actors: int
    cpus: float
    gpus: float
    threads: int


def share_cluster(cluster: Cluster, tasks: int, uses_gpu: bool) -> Share:
    """A GPU for each actor where it is of use and GPUs are there; else a CPU."""
    if uses_gpu and cluster.gpus >= 1:
        threads = int(max(1, min(THREADS_PER_GPU, cluster.cpus // cluster.gpus)))
        return Share(min(tasks, int(cluster.gpus)), threads, 1, threads)
    return Share(max(1, min(tasks, int(cluster.cpus))), 1, 0, 1)


class ProgressCounter:
    """An actor that adds up the images of all others."""

    def __init__(self) -> None:
        self._images = 0

    def add(self, images: int) -> None:
        """Count some more, or, of a task that begins again, fewer."""
        self._images += images

    def images(self) -> int:
        """All so far."""
        return self._images


def new_counter() -> Any:
    """A Counter's handle. Where its process dies it begins at 0 again: it is for showing alone."""
    import ray

    return ray.remote(ProgressCounter).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


def read_counter(counter: Any, before: int) -> int:
    """Images so far; `before` while the counter does not answer."""
    import ray

    try:
        return max(0, int(ray.get(counter.images.remote(), timeout=HEALTH_CHECK_SECONDS)))
    except ray.exceptions.GetTimeoutError:
        return before


class TaskError(Exception):
    """A task that failed for a reason of its own, which is the cause."""

    def __init__(self, task: Any, cause: BaseException) -> None:
        super().__init__(f"{task}: {cause}")
        self.task, self.cause = task, cause


@dataclass(frozen=True)
class ActorPool(Generic[TaskT]):
    """How tasks are given to actors."""

    new_actor: Callable[[], Any]
    start: Callable[[Any, TaskT], Any]
    """Begins a task on an actor and returns the reference of its result."""
    named: Callable[[TaskT], str]
    """A task in words."""
    kept: str
    """What is kept when the work ends early, in words."""
    cluster: Cluster

    def run(self, tasks: Sequence[TaskT], actors: int) -> Iterator[tuple[TaskT, Any] | None]:
        """Have every task done; yields each with its result as it is done, and None now and then while waiting.

        Raises TaskError where a task fails, and JobError where its actor is lost again and again or Ray itself is.
        """
        import ray

        waiting = list(reversed(range(len(tasks))))
        lost = dict.fromkeys(waiting, 0)
        working: dict[Any, tuple[Any, int]] = {}
        idle = [self.new_actor() for _ in range(actors)]
        looked = time.monotonic()
        while waiting or working:
            if time.monotonic() - looked > HEALTH_CHECK_SECONDS:
                looked = time.monotonic()
                self.cluster.require_alive()
            while idle and waiting:
                actor, number = idle.pop(), waiting.pop()
                working[self.start(actor, tasks[number])] = (actor, number)
            ready, _ = ray.wait(list(working), timeout=POLL_SECONDS)
            for reference in ready:
                actor, number = working.pop(reference)
                task = tasks[number]
                try:
                    yield task, ray.get(reference)
                    idle.append(actor)
                except ray.exceptions.RayActorError as error:
                    lost[number] += 1
                    if lost[number] >= MAX_ATTEMPTS:
                        raise JobError(
                            f"{self.named(task)} was lost with its worker {MAX_ATTEMPTS} times ({summarize(error)}). {self.kept}: "
                            "the same command goes on."
                        ) from error
                    waiting.append(number)
                    idle.append(self.new_actor())
                except ray.exceptions.RayTaskError as error:
                    raise TaskError(task, error.cause) from error
            yield None
