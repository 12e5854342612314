"""Runs a job's tasks on a pool of actors of a Ray cluster, with progress, restarts of lost actors and liveness checks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

from soflow_core.failures import InputError, summarize
from soflow_platform.cluster.connection import Cluster
from soflow_platform.errors import JobError

TaskT = TypeVar("TaskT")

MAX_ATTEMPTS = 3
THREADS_PER_GPU = 8
POLL_SECONDS = 0.5
COUNTER_SECONDS = 5.0
"""How long the progress counter may take to answer."""


@dataclass(frozen=True)
class Progress:
    """Images done, and in all."""

    done: int
    total: int


Report = Callable[[Progress], None]


def no_report(progress: Progress) -> None:
    """For a caller that shows no progress."""
    del progress


@dataclass(frozen=True)
class Share:
    """Number of actors, and what each gets of the cluster."""

    actors: int
    cpus: float
    gpus: float
    threads: int


def share_cluster(cluster: Cluster, tasks: int, uses_gpu: bool, workers: int | None = None) -> Share:
    """A GPU for each actor where it is of use and GPUs are there; else a CPU. More `workers` than these share them."""
    if uses_gpu and cluster.gpus >= 1:
        actors = min(tasks, workers or int(cluster.gpus))
        gpus = _share(cluster.gpus, actors)
        threads = int(max(1, min(THREADS_PER_GPU, cluster.cpus // max(cluster.gpus, actors))))
        return Share(actors, _share(cluster.cpus, actors, threads), gpus, threads)
    actors = max(1, min(tasks, workers or int(cluster.cpus)))
    return Share(actors, _share(cluster.cpus, actors), 0, 1)


def _share(resources: float, actors: int, wanted: float = 1.0) -> float:
    """What each actor gets, at most `wanted`; rounded down, so that all of them find a place."""
    return wanted if actors * wanted <= resources else math.floor(1000 * resources / actors) / 1000


def deterministic_torch(threads: int) -> str:
    """Set torch in this process to one thread (`threads` on a GPU) and deterministic float32 kernels; returns the device.

    A block of statistics, or a latent, that is computed again has then the same bits on every machine of a kind. TF32 would move
    images and features from one kind of GPU to another.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(threads if on_gpu else 1)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    return "cuda" if on_gpu else "cpu"


@contextlib.contextmanager
def one_cpu() -> Iterator[None]:
    """In the block, torch computes in this process, and in threads begun in it, as in an actor with one CPU."""
    import torch

    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    deterministic_torch(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = before


class ProgressCounter:
    """An actor that sums the images of all others."""

    def __init__(self) -> None:
        self._images = 0

    def add(self, images: int) -> None:
        """Add images; a task that begins again takes back what it had counted."""
        self._images += images

    def images(self) -> int:
        """The sum."""
        return self._images


def new_counter() -> Any:
    """Handle of a new ProgressCounter. It restarts at 0 where its process dies: it is for display alone."""
    import ray

    return ray.remote(ProgressCounter).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


def read_counter(counter: Any, before: int) -> int:
    """Images so far; `before` where the counter does not answer."""
    import ray

    try:
        return max(0, int(ray.get(counter.images.remote(), timeout=COUNTER_SECONDS)))
    except ray.exceptions.GetTimeoutError:
        return before


@dataclass(frozen=True)
class ActorPool(Generic[TaskT]):
    """Actors of one class that share a cluster's CPUs or GPUs, and run tasks one after the other.

    class Squarer:
        def __init__(self, offset, threads, count):  # the pool's `arguments`, then these two
            self.offset, self.count = offset, count
        def run(self, task):
            self.count(1)  # reports progress: so many images more
            return task * task + self.offset

    pool = ActorPool(cluster, Squarer, (7,), describe=lambda task: f"task {task}", resume_hint="Finished tasks are kept")
    for task, result in pool.imap_unordered([1, 2, 3], Progress(0, 3), report):
        ...
    """

    cluster: Cluster
    actor_class: type
    arguments: tuple[Any, ...]
    """Plain data for the actors' constructor; sent to each node once."""
    describe: Callable[[TaskT], str]
    """Names a task in an error message."""
    resume_hint: str
    """Beginning of a sentence that says which results are kept after a failure."""
    uses_gpu: bool = True
    workers: int | None = None
    """Number of actors; None: one for each GPU or CPU."""

    def imap_unordered(
        self, tasks: Sequence[TaskT], start: Progress, report: Report
    ) -> Iterator[tuple[TaskT, Any]]:
        """Run every task; yields each with its result as it is done, and meanwhile reports the images done since `start`.

        A task whose actor dies is run again by a new actor, up to MAX_ATTEMPTS times. An InputError of a task is raised as it is.
        Raises JobError where a task fails otherwise or loses its actor too often, and RayLost where this process's Ray has died.
        """
        import ray

        share = share_cluster(self.cluster, len(tasks), self.uses_gpu, self.workers)
        counter, images = new_counter(), 0
        arguments = [ray.put(argument) for argument in self.arguments]
        remote_class = ray.remote(_with_counter(self.actor_class))

        def new_actor() -> Any:
            placed = remote_class.options(num_cpus=share.cpus, num_gpus=share.gpus)
            return placed.remote(*arguments, share.threads, counter)

        for finished in self._run(tasks, new_actor, share.actors):
            images = read_counter(counter, images)
            report(Progress(min(start.total, start.done + images), start.total))
            if finished is not None:
                yield finished

    def _run(
        self, tasks: Sequence[TaskT], new_actor: Callable[[], Any], actors: int
    ) -> Iterator[tuple[TaskT, Any] | None]:
        """As `imap_unordered`; yields None after each wait for results."""
        import ray

        check_ray = self.cluster.health_check()
        waiting = list(reversed(range(len(tasks))))
        lost = dict.fromkeys(waiting, 0)
        working: dict[Any, tuple[Any, int]] = {}
        idle = [new_actor() for _ in range(actors)]
        while waiting or working:
            check_ray()
            while idle and waiting:
                actor, number = idle.pop(), waiting.pop()
                working[actor.run.remote(tasks[number])] = (actor, number)
            # A task of a lost node may wait in a new actor for a place, which one that has nothing left to do holds.
            while idle and working:
                ray.kill(idle.pop())
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
                            f"{self.describe(task)} was lost with its worker {MAX_ATTEMPTS} times ({summarize(error)}). "
                            f"{self.resume_hint}: the same command goes on."
                        ) from error
                    waiting.append(number)
                    idle.append(new_actor())
                except ray.exceptions.RayTaskError as error:
                    raise_failure(self.describe(task), self.resume_hint, error.cause)
            yield None


def raise_failure(task: str, resume_hint: str, cause: BaseException) -> NoReturn:
    """Raises why a task failed: an InputError as it is, anything else as a JobError that names the task and says what is kept."""
    if isinstance(cause, InputError):
        raise cause
    raise JobError(f"{task} failed: {summarize(cause)}. {resume_hint}: the same command goes on.") from cause


def _with_counter(actor_class: type) -> type:
    """The class whose last constructor argument, the handle of the counter, becomes a function that counts images."""

    class PoolActor(actor_class):
        def __init__(self, *arguments: Any) -> None:
            *others, counter = arguments

            def count(images: int) -> None:
                counter.add.remote(images)

            super().__init__(*others, count)

    return PoolActor
