"""soflow_pipelines.preparation.state"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from soflow_pipelines.preparation.shard_plan import Preparation
from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo, ShardError
from soflow_pipelines.shards.tables import ShardRecord, publish_set, read_info
from soflow_pipelines.shards.writer import shard_name
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import ObjectStore

NOTES = ".preparing"


PLAN_NAME = f"{NOTES}/plan.json"


def _note_name(shard: int) -> str:
    return f"{NOTES}/{shard_name(shard)}.parquet"


def _note(record: ShardRecord, left_out: list[str]) -> bytes:
    assert record.index is not None
    facts = {**asdict(replace(record, index=None)), "left_out": left_out}
    buffer = io.BytesIO()
    pq.write_table(record.index.replace_schema_metadata({"record": json.dumps(facts)}), buffer)
    return buffer.getvalue()


def _read_note(storage: ObjectStore, shard: int) -> tuple[ShardRecord, list[str]]:
    table = pq.read_table(io.BytesIO(storage.read(_note_name(shard))))
    facts = json.loads(table.schema.metadata[b"record"])
    left_out = facts.pop("left_out")
    facts["label_counts"] = {int(label): count for label, count in facts["label_counts"].items()}
    return ShardRecord(**{**facts, "index": table.replace_schema_metadata(None)}), left_out


def start(plan: Preparation, storage: ObjectStore) -> list[int] | None:
    """The shards that are still to be built; None where the set is complete already.

    ShardError where the place holds something else, naming what differs.
    """
    if storage.size(INFO_NAME) is not None:
        _check_same(plan.recipe(), dict(read_info(storage.uri).recipe), f"{storage.uri} holds a finished set")
        clear_notes(storage)
        return None
    names = storage.names()
    if PLAN_NAME in names:
        _check_same(
            plan.recipe(), json.loads(storage.read(PLAN_NAME)), f"{storage.uri} holds an unfinished set"
        )
    elif foreign := [name for name in names if not name.startswith(f"{NOTES}/")]:
        raise ShardError(f"{storage.uri} is not empty: it holds {foreign[0]}; name another place.")
    else:
        storage.write(PLAN_NAME, json.dumps(plan.recipe(), indent=2).encode())
    present = set(names)
    # A note without its shard is what is left when someone removed the shard.
    return [s for s in range(plan.shards) if _note_name(s) not in present or shard_name(s) not in present]


def _check_same(wanted: dict[str, Any], found: dict[str, Any], what: str) -> None:
    if found == json.loads(json.dumps(wanted)):
        return
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    said = ", ".join(
        f"{name} {_short(found.get(name))} instead of {_short(wanted[name])}" for name in differing
    )
    raise ShardError(
        f"{what} of other settings ({said or 'of another version'}); name another place or remove it."
    )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else repr(value)


def finish(plan: Preparation, storage: ObjectStore) -> DatasetInfo:
    """Writes index, manifest and `dataset.json` when every shard is there."""
    notes = [_read_note(storage, shard) for shard in range(plan.shards)]
    left_out = tuple(sorted(name for _, names in notes for name in names))
    info = publish_set(storage, replace(plan.info, left_out=left_out), [record for record, _ in notes])
    clear_notes(storage)
    return info


def clear_notes(storage: ObjectStore) -> None:
    """Removes the notes, and what a killed worker left beside them."""
    if isinstance(storage, LocalFolder):
        shutil.rmtree(storage.path(NOTES), ignore_errors=True)
        return
    for name in storage.names():
        if name.startswith(f"{NOTES}/"):
            storage.remove(name)


@contextmanager
def only_one(storage: ObjectStore) -> Iterator[None]:
    """Keeps a second preparation on this machine out of the same place. ShardError where one is at work."""
    place = hashlib.sha256(str(getattr(storage, "folder", storage.uri)).encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir(), f"soflow-{os.getuid()}-{place}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{storage.uri} is being prepared by another process on this machine.") from None
        yield
