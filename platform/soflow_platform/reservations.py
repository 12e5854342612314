"""What a trial's workers hold of a Ray cluster, noted in the trial's folder, so that its next life frees what was left behind.

Ray Train's controller holds a placement group for its workers, and the promise of Ray's coordinator that these machines are its own.
Where a controller is killed, one more process frees the group, unless it dies at the same time: then nobody does before the sweep ends.
The coordinator forgets after three minutes. A trial's new workers would wait for both.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from soflow_platform.cluster import COORDINATOR
from soflow_platform.storage import read_json, write_json

RESERVATION = "reservation.json"


def note_reservation(folder: Path) -> None:
    """Called in a Ray Train worker: note the placement group that it and its like are in, and who asked for it."""
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    if group is None:
        return
    try:
        write_json(folder / RESERVATION, {"placement_group": group.id.hex(), "requester": _requester()})
    except OSError as error:
        # A disk that is full: only a second fault would ask for the note.
        logging.getLogger(__name__).warning("%s cannot be written: %s", folder / RESERVATION, error)


def free_reservation(folder: Path) -> bool:
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


def _requester() -> str | None:
    """The name under which this worker's controller asks for machines; None where this version of Ray does not say."""
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return f"train-{get_train_context().train_run_context.run_id}"
    except (ImportError, AttributeError):
        return None
