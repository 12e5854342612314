"""Records a trial's placement group in its folder, so that a restarted trial can release it.

Ray Train's controller holds a placement group for its workers and a request for machines at Ray's AutoscalingCoordinator. A controller
that is killed together with the process that cleans up after it leaves the group until the sweep ends, and the request for three
minutes; new workers of the same trial would wait for both.
"""

from __future__ import annotations

import logging
from pathlib import Path

from soflow_pipelines.storage.files import read_json, write_json
from soflow_platform.cluster.ray_internals import autoscaling_requester, cancel_autoscaling_request

RESERVATION = "reservation.json"


def record_placement_group(folder: Path) -> None:
    """Record the placement group of this Ray Train worker and the name under which its controller asks for machines."""
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    if group is None:
        return
    record = {"placement_group": group.id.hex(), "requester": autoscaling_requester()}
    try:
        write_json(folder / RESERVATION, record)
    except OSError as error:
        # A full disk: the record is needed only if the controller is killed as well.
        logging.getLogger(__name__).warning("%s cannot be written: %s", folder / RESERVATION, error)


def release_placement_group(folder: Path) -> bool:
    """Release what the workers recorded last still hold, ending those that live. Returns whether there was a placement group."""
    import ray
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    record = read_json(folder / RESERVATION) or {}
    if record.get("requester"):
        # Ray releases an abandoned group, but not the request of its controller, which may have died with its node.
        cancel_autoscaling_request(record["requester"])
    group = placement_group_table().get(record.get("placement_group"))
    if group is None or group["state"] == "REMOVED":
        return False
    remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(record["placement_group"])))
    return True
