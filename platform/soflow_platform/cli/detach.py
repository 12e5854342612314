"""soflowctl run --detach: hands a sweep to the cluster, and says how to find it again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from soflow_platform.cli.terminal import storage_flag
from soflow_platform.errors import UserError
from soflow_platform.jobs.detached import (
    BEGIN_SECONDS,
    end_of,
    job_of,
    require_same_from_everywhere,
    submit,
)
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import SweepRecord
from soflow_platform.tuning.status import sweep_runs

if TYPE_CHECKING:
    from rich.console import Console


def detach(
    screen: Console, storage: ProjectFolder, record: SweepRecord, options: Sequence[str], address: str | None
) -> None:
    """Submit the sweep's command, with its settings in full and these options. Raises UserError where it runs already."""
    import yaml

    assert address is not None
    before = job_of(storage, record.id)
    begins = (
        before is not None
        and time.time() - before.submitted < BEGIN_SECONDS
        and end_of(storage, record.id) is None
    )
    if begins or sweep_runs(storage, record):
        raise UserError(
            f"sweep {record.id} is running already: see it with `soflowctl attach {record.id}{storage_flag(storage)}`."
        )
    require_same_from_everywhere(record.experiment["data"].get("source"))
    record.save(storage)
    job = submit(storage, record.id, yaml.safe_dump(record.experiment, sort_keys=False), options, address)
    name = f"{record.id}{storage_flag(storage)}"
    screen.print(f"sweep {record.id} runs as job {job.job} at {address}", highlight=False)
    for what in ("attach", "status", "logs", "stop"):
        screen.print(f"            soflowctl {what} {name}", highlight=False, soft_wrap=True)
