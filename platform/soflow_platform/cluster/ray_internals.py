"""Everything taken from Ray's private modules, tried with Ray 2.60.

Each name is imported where it is used, and its absence in another version of Ray costs what the function says, not the sweep. A test
imports the same names and fails when the pinned Ray moves one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterator
from typing import Any

TRIED_WITH = ("2.60",)
"""Versions of Ray, major and minor."""
COORDINATOR = "AutoscalingCoordinator"
"""Ray's name and namespace of the actor that Ray Train's controllers ask for machines."""
PRIVATE_NAMES = {
    "coordinator": (
        "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
        "_AutoscalingCoordinatorActor",
    ),
    "start_process": ("ray._private.services", "ConsolePopen"),
    "train_context": ("ray.train.v2._internal.execution.context", "get_train_context"),
}
"""Module and name of each."""


def private(key: str) -> Any:
    """A private object of Ray. Raises ImportError or AttributeError where this version keeps it elsewhere."""
    module, name = PRIVATE_NAMES[key]
    return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def ray_in_own_session() -> Iterator[None]:
    """Processes that Ray starts in the block get a session of their own, so that a signal to this command's group passes them by.

    They still end when this process does. Where this version of Ray starts them in another way, a warning says so.
    """
    module, name = PRIVATE_NAMES["start_process"]
    try:
        start = private("start_process")
    except (ImportError, AttributeError):
        logging.getLogger(__name__).warning(
            "Ray %s starts its processes elsewhere than %s: a signal to the process group may end Ray before trials are saved",
            importlib.import_module("ray").__version__,
            " and ".join(TRIED_WITH),
        )
        yield
        return
    services = importlib.import_module(module)
    setattr(services, name, functools.partial(start, start_new_session=True))
    try:
        yield
    finally:
        setattr(services, name, start)


def start_autoscaling_coordinator() -> None:
    """Create Ray's AutoscalingCoordinator as a detached, restartable actor, before Ray Train does.

    Ray would pin it to the node that asks first; if that node died, elastic trials could never be resized. The name and namespace are
    Ray's, so that Train uses this one. Where this version of Ray keeps the class elsewhere, a warning says so and nothing is created.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        coordinator = private("coordinator")
    except (ImportError, AttributeError):
        logging.getLogger(__name__).warning(
            "Ray %s keeps its AutoscalingCoordinator elsewhere than %s: a node that is lost may stop elastic trials",
            ray.__version__,
            " and ".join(TRIED_WITH),
        )
        return
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    ray.remote(coordinator).options(
        name=COORDINATOR,
        namespace=COORDINATOR,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=this_node,
    ).remote()


def cancel_autoscaling_request(requester: str) -> None:
    """Withdraw a Train controller's request for machines; without effect where no coordinator runs."""
    import ray

    try:
        coordinator = ray.get_actor(COORDINATOR, namespace=COORDINATOR)
    except ValueError:
        return
    coordinator.cancel_request.remote(requester)


def autoscaling_requester() -> str | None:
    """The name under which this worker's Train controller asks for machines; None where this version of Ray keeps it elsewhere."""
    try:
        return f"train-{private('train_context')().train_run_context.run_id}"
    except (ImportError, AttributeError):
        return None
