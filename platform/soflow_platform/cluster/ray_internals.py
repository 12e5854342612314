"""soflow_platform.cluster.ray_internals"""

from __future__ import annotations

import logging

COORDINATOR = "AutoscalingCoordinator"
"""Name and namespace of the actor that Ray Train's controllers ask for machines."""


def start_autoscaling_coordinator() -> None:
    """Start what Ray Train's controllers ask for machines, so that it outlasts its node.

    Ray keeps one for a cluster and ties it to the node that first asks. Where that node dies, trials that may go on with fewer
    workers ask in vain for ever. One of the same name that may run on any node is taken for it; where it restarts, who knew it
    still does.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            _AutoscalingCoordinatorActor,
        )
    except ImportError:
        logging.getLogger(__name__).warning(
            "this version of Ray keeps its AutoscalingCoordinator elsewhere than 2.60: a node that is lost may stop elastic trials"
        )
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    ray.remote(_AutoscalingCoordinatorActor).options(
        name=COORDINATOR,
        namespace=COORDINATOR,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=here,
    ).remote()


def autoscaling_requester() -> str | None:
    """The name under which this worker's controller asks for machines; None where this version of Ray does not say."""
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return f"train-{get_train_context().train_run_context.run_id}"
    except (ImportError, AttributeError):
        return None
