"""What a trial's workers hold of a Ray cluster, noted in the trial's folder, so that its next life frees what was left behind.

Ray Train frees the CPUs and GPUs of a controller that was killed through one more process. Where both die at once nobody frees them
before the sweep ends, and the trial's new workers would wait for them for ever.
"""

from __future__ import annotations

import logging
from pathlib import Path

from soflow_platform.storage import read_json, write_json

RESERVATION = "reservation.json"


def note_reservation(folder: Path) -> None:
    """Called in a Ray Train worker: note the placement group that it and its like are in."""
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    if group is None:
        return
    try:
        write_json(folder / RESERVATION, {"placement_group": group.id.hex()})
    except OSError as error:
        # A disk that is full: only a second fault would ask for the note.
        logging.getLogger(__name__).warning("%s cannot be written: %s", folder / RESERVATION, error)


def free_reservation(folder: Path) -> bool:
    """Free what the workers that noted it last still hold, ending those that live. Returns whether there was something."""
    from ray import PlacementGroupID
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup

    noted = (read_json(folder / RESERVATION) or {}).get("placement_group")
    held = placement_group_table().get(noted)
    if held is None or held["state"] == "REMOVED":
        return False
    remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(noted)))
    return True
