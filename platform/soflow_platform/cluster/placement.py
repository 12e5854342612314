"""What a trial's workers hold of a Ray cluster, noted in the trial's folder, so that its next life frees what was left behind.

Ray Train's controller holds a placement group for its workers, and the promise of Ray's coordinator that these machines are its own.
Where a controller is killed, one more process frees the group, unless it dies at the same time: then nobody does before the sweep ends.
The coordinator forgets after three minutes. A trial's new workers would wait for both.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from soflow_pipelines.storage.files import read_json, write_json
from soflow_platform.cluster.ray_internals import COORDINATOR, autoscaling_requester

RESERVATION = "reservation.json"


def record_placement_group(folder: Path) -> None:
    """Called in a Ray Train worker: note the placement group that it and its like are in, and who asked for it."""
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    if group is None:
        return
    try:
        write_json(
            folder / RESERVATION, {"placement_group": group.id.hex(), "requester": autoscaling_requester()}
        )
    except OSError as error:
        # A disk that is full: only a second fault would ask for the note.
        logging.getLogger(__name__).warning("%s cannot be written: %s", folder / RESERVATION, error)


def release_placement_group(folder: Path) -> bool:
    """Free what the workers that noted it last still hold, ending those that live. Returns whether there was something."""
    import ray
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    noted = read_json(folder / RESERVATION) or {}
    if noted.get("requester"):
        # Ray frees a group that is left, but not the promise; who gave it may have gone with its node.
        with contextlib.suppress(ValueError):
            ray.get_actor(COORDINATOR, namespace=COORDINATOR).cancel_request.remote(noted["requester"])
    held = placement_group_table().get(noted.get("placement_group"))
    if held is None or held["state"] == "REMOVED":
        return False
    remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(noted["placement_group"])))
    return True
