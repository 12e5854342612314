"""Connects to a Ray cluster at an address, or starts a local Ray that lasts as long as the command; checks that it is alive."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from soflow_core.failures import summarize
from soflow_platform.cluster.capacity import Machine
from soflow_platform.cluster.code_shipping import shipped_code, with_plugins
from soflow_platform.cluster.ray_internals import keep_keys_out_of_logs, own_processes, without_servers
from soflow_platform.cluster.session_folder import session_root
from soflow_platform.errors import JobError, UserError

RAY_START_SECONDS = 8.0
"""What a start of Ray and of its actors takes on a small machine."""
PROBE_SECONDS = 5.0
HEALTH_CHECK_SECONDS = 5.0
"""Interval at which a loop that waits for Ray checks that it is alive."""
HEALTH_SECONDS = 20.0
DRIVER_CPUS = 0.1
"""CPUs that Tune reserves for a process that only watches a trial's workers."""

_QUIET = {
    # Unset, a local start turns token authentication on and clients without the token fail.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A trial that may run with fewer workers does not wait a minute for the lost one.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The command handles Ctrl-C; Tune's handler would go on as if the trials had been stopped.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A trial that was stopped before its first evaluation ends without the metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class RayLost(JobError):
    """The Ray node that this process is connected to has died."""


@dataclass(frozen=True)
class Cluster:
    """A Ray that this process is connected to, and its resources when it connected."""

    address: str
    local: bool
    cpus: float
    gpus: float
    nodes: int
    machines: int
    """Different addresses among the nodes."""
    rooms: tuple[Machine, ...] = ()
    """What each node has."""

    def require_alive(self) -> None:
        """Raises RayLost where this process's Ray node has died: calls to it would not return."""
        import ray

        this_node = ray.get_runtime_context().get_node_id()
        if not any(node["Alive"] and node["NodeID"] == this_node for node in ray.nodes()):
            raise RayLost(
                "the Ray node that this command is connected to has died. What is saved is kept: the same command goes on."
            )

    def health_check(self) -> Callable[[], None]:
        """A function to call in a loop: `require_alive`, at most every HEALTH_CHECK_SECONDS."""
        checked = time.monotonic()

        def check() -> None:
            nonlocal checked
            if time.monotonic() - checked > HEALTH_CHECK_SECONDS:
                checked = time.monotonic()
                self.require_alive()

        return check


@contextlib.contextmanager
def connected(address: str | None, dashboard: bool = False) -> Iterator[Cluster]:
    """Connect for the length of a block. None starts a local Ray on this machine, with all its cores, in a session of its own.

    A local Ray has its sockets and logs in a folder that is private to the user; its processes listen on the loopback address.
    `dashboard` says whether it starts its dashboard as well, without which Ray Train does not release the machines of a trial that
    is ended early. The workers of a cluster run this process's code (`code_shipping`).

    Raises UserError where no Ray answers at `address`, within seconds, or one of another version does.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    require_answer(address)
    import ray

    keep_keys_out_of_logs()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with _options(address, dashboard) as options:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace="soflow", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        ray.shutdown()
        if (mismatch := _other_versions(str(error), address)) is not None:
            raise UserError(mismatch) from None
        raise UserError(
            f"Ray at {address or 'this machine'} refused the connection: {summarize(error)}."
        ) from None
    except Exception as error:
        # Ray raises a plain Exception where one of its processes has not started in time, with that one's log as its text.
        if address is not None or type(error) is not Exception:
            raise
        raise JobError(
            f"Ray did not start on this machine, which may be too busy; its logs are below {session_root()}. "
            "The same command tries again."
        ) from error
    if threading.current_thread() is threading.main_thread():
        # Ray aborts the process on SIGTERM; the caller's handler closes its runs first.
        for number, handler in before.items():
            signal.signal(number, handler)
    try:
        resources = ray.cluster_resources()
        alive = [node for node in ray.nodes() if node["Alive"]]
        yield Cluster(
            address=ray.get_runtime_context().gcs_address,
            local=address is None,
            cpus=resources.get("CPU", 0.0) - (1 if address is None else 0),
            gpus=resources.get("GPU", 0.0),
            nodes=len(alive),
            machines=len({node["NodeManagerAddress"] for node in alive}),
            rooms=tuple(
                Machine(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
                for node in alive
            ),
        )
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _options(address: str | None, dashboard: bool) -> Iterator[dict[str, Any]]:
    """Arguments of `ray.init`, to be called in the block, that depend on whether it starts a Ray."""
    if address is not None:
        with shipped_code() as environment:
            yield {"address": address, "runtime_env": with_plugins(environment)}
        return
    with contextlib.ExitStack() as changes:
        changes.enter_context(own_processes())
        if not dashboard:
            changes.enter_context(without_servers())
        # Ray places trial drivers on logical CPUs; one more than the cores keeps every core for the workers.
        options: dict[str, Any] = {"address": "local", "num_cpus": (os.cpu_count() or 1) + 1}
        options |= {"include_dashboard": dashboard, "_temp_dir": str(session_root())}
        if environment := with_plugins({}):
            options["runtime_env"] = environment
        yield options | ({"dashboard_host": "127.0.0.1"} if dashboard else {})


def _other_versions(text: str, address: str | None) -> str | None:
    """A sentence where Ray's refusal `text` is about versions of Ray or Python, else None."""
    theirs = re.search(r"cluster was started with:\s+Ray: (\S+)\s+Python: (\S+)", text)
    if theirs is None:
        return None
    import ray

    there, here = theirs.groups(), (ray.__version__, platform.python_version())
    what = " and ".join(
        name for name, one, other in zip(("Ray", "Python"), there, here, strict=True) if one != other
    )
    return (
        f"the cluster at {address} runs Ray {there[0]} on Python {there[1]}, this command Ray {here[0]} on Python {here[1]}: "
        f"install the same {what} on both sides."
    )


def require_answer(address: str | None) -> None:
    """Raises UserError unless something listens at HOST:PORT; Ray's own attempt would wait for minutes."""
    if address is None:
        return
    if "://" in address:
        raise UserError(
            f"--address {address} is a Ray Client address: run on a machine of the cluster with --address HEAD:6379, "
            "or submit the command with `ray job submit`."
        )
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or not host:
        raise UserError(f"--address {address!r} is not of the form HOST:PORT, such as 10.0.0.1:6379.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_answer(address, getattr(error, "strerror", None) or str(error)) from None
    # Something listens; Ray's own check finds out whether it is Ray, and has no time limit.
    # Another version of Ray is refused later, by its name.
    check = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "health-check",
        "--skip-version-check",
        "--address",
        address,
    ]
    try:
        done = subprocess.run(
            check,
            # A copy: the process's own may be changed by another thread's imports while the program is started.
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=HEALTH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _no_answer(address, "something else listens there") from None
    if done.returncode == 0:
        return
    if re.search(r"InvalidAuthToken|no authentication token|AuthenticationError", done.stderr, re.IGNORECASE):
        raise UserError(
            f"Ray at {address} asks for another token than this command's: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the "
            "cluster's, or put it into ~/.ray/auth_token."
        )
    raise _no_answer(address, "something else listens there")


def _no_answer(address: str, reason: str) -> UserError:
    return UserError(
        f"no Ray answers at {address} ({reason}); start one with `ray start --head`, or leave --address out "
        "to use this machine."
    )
