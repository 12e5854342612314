"""Everything taken from Ray's private modules, tried with Ray 2.60.

Each name is imported where it is used, and its absence in another version of Ray costs what the function says, not the sweep. A test
imports the same names and fails when the pinned Ray moves one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
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
    "reachable": ("ray._private.ray_constants", "ENABLE_RAY_CLUSTER"),
    "processes": ("ray._private.services", "ConsolePopen"),
    "node": ("ray._private.node", "Node"),
    "passed_variables": ("ray.tune.execution.class_cache", "ENV_VARS_TO_PROPAGATE"),
    "train_context": ("ray.train.v2._internal.execution.context", "get_train_context"),
}
"""Module and name of each."""
SERVERS = ("start_api_server", "start_monitor", "start_log_monitor")
"""Methods of Ray's node that start what a command on one machine has no use for."""
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
"""Variables that Tune passes to its actors, and that Ray writes to its logs on the way."""


def private(key: str) -> Any:
    """A private object of Ray. Raises ImportError or AttributeError where this version keeps it elsewhere."""
    module, name = PRIVATE_NAMES[key]
    return getattr(importlib.import_module(module), name)


def import_ray() -> None:
    """Import what a driver of Ray Tune needs, and what Ray imports when it starts on this machine."""
    importlib.import_module("ray.tune")
    with contextlib.suppress(ImportError):
        importlib.import_module("ray.dashboard.optional_deps")


@contextlib.contextmanager
def own_processes() -> Iterator[None]:
    """Ray's processes that are started in the block listen on the loopback address, and get a session of their own.

    A signal to the command's process group (`timeout`, a terminal that closes) then reaches the command alone, which still
    needs Ray to save and to close its runs. They die with the command all the same: the kernel sees to that on Linux.
    Without effect where this version of Ray keeps what starts them elsewhere.
    """
    with contextlib.ExitStack() as changes:
        # Ray takes no command from another machine, for it would take them from anybody. Its variable is for other systems,
        # where that is the default.
        changes.enter_context(_environment("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0"))
        changes.enter_context(_replaced("reachable", False))
        if sys.platform.startswith("linux"):
            with contextlib.suppress(ImportError, AttributeError):
                popen = functools.partial(private("processes"), start_new_session=True)
                changes.enter_context(_replaced("processes", popen))
        yield


@contextlib.contextmanager
def without_servers() -> Iterator[None]:
    """A local Ray that is started in the block has no API server, no autoscaler and no log monitor.

    They serve Ray's own page and commands, machines that come and go, and logs that are printed by the driver; none of them is there
    for a command on one machine, where each takes a second to start. Without effect where this version of Ray starts them otherwise.
    """

    def leave_out(node: Any, **options: Any) -> None:
        del options
        node._webui_url = ""

    with contextlib.ExitStack() as changes:
        with contextlib.suppress(ImportError, AttributeError):
            node = private("node")
            methods = {name: getattr(node, name) for name in SERVERS}
            for name, method in methods.items():
                setattr(node, name, leave_out)
                changes.callback(setattr, node, name, method)
        yield


@contextlib.contextmanager
def _replaced(key: str, value: Any) -> Iterator[None]:
    """A private object of Ray is another for the length of a block; without effect where it is kept elsewhere."""
    module, name = PRIVATE_NAMES[key]
    try:
        before = private(key)
    except (ImportError, AttributeError):
        yield
        return
    setattr(importlib.import_module(module), name, value)
    try:
        yield
    finally:
        setattr(importlib.import_module(module), name, before)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def keep_keys_out_of_logs() -> None:
    """Take keys off the variables that Tune passes on; processes on this machine have them from the command.

    Those on other machines have their own. Without effect where this version of Ray keeps the names elsewhere.
    """
    with contextlib.suppress(ImportError, AttributeError):
        private("passed_variables").difference_update(KEYS)


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


def draining_nodes() -> set[str]:
    """Ids of the nodes that Ray was told it will lose: by a cloud's notice of preemption, its autoscaler, or `ray drain-node`.

    Empty where this version of Ray keeps that elsewhere, and where its head does not answer.
    """
    try:
        from ray._private.state import state

        return set(state.get_draining_nodes())
    except Exception:
        return set()
