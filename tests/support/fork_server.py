"""The server whose forks are the ranks of a test: it imports once what every rank would."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.context import ForkServerContext

CORE = ("tests.support.gloo_ranks", "torch._dynamo", "torch.distributed.fsdp")
PLATFORM = (
    "tests.support.ranks",
    "soflow_platform.training.worker",
    "mlflow.store.tracking.sqlalchemy_store",
)


def fork_server() -> ForkServerContext:
    """The one server of this process. It imports what is named when it starts, so that all tests must name the same."""
    context = multiprocessing.get_context("forkserver")
    # The core's tests run where there is no MLflow, and alone in less time without it.
    platform = PLATFORM if "soflow_platform" in sys.modules else ()
    context.set_forkserver_preload([*CORE, *platform])
    return context
