"""Progress of a preparation, kept in the store beside the shards, so that it can be resumed.

`.preparing/` holds the recipe of the set and, for each shard that was built, its rows of manifest and index. It is removed when
`dataset.json` has been written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from soflow_core.failures import printable, summarize
from soflow_pipelines.preparation.shard_plan import ShardPlan
from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo, ShardError
from soflow_pipelines.shards.schema import parse_object
from soflow_pipelines.shards.tables import ShardRecord, publish_set, read_info
from soflow_pipelines.shards.writer import shard_name
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import ObjectStore

STATE_FOLDER = ".preparing"
RECIPE_NAME = f"{STATE_FOLDER}/plan.json"


@dataclass(frozen=True)
class BuiltShard:
    """A shard that was built and published."""

    record: ShardRecord
    left_out: tuple[str, ...]
    """Damaged images of the shard that were left out."""


def _built_name(shard: int) -> str:
    return f"{STATE_FOLDER}/{shard_name(shard)}.parquet"


def record_built(store: ObjectStore, shard: int, built: BuiltShard) -> None:
    """Records that a shard was built. Raises StorageError."""
    index = built.record.index
    assert index is not None
    fields = {**asdict(replace(built.record, index=None)), "left_out": list(built.left_out)}
    buffer = pa.BufferOutputStream()
    pq.write_table(index.replace_schema_metadata({"record": json.dumps(fields)}), buffer)
    store.write(_built_name(shard), buffer.getvalue().to_pybytes())


def _read_built(store: ObjectStore, shard: int) -> BuiltShard:
    name = _built_name(shard)
    try:
        table = pq.read_table(pa.BufferReader(store.read(name)))
        fields = parse_object(table.schema.metadata[b"record"].decode())
        left_out = fields.pop("left_out")
        fields["label_counts"] = {int(label): count for label, count in fields["label_counts"].items()}
        fields["index"] = table.replace_schema_metadata(None)
        return BuiltShard(ShardRecord(**fields), tuple(left_out))
    except (pa.ArrowException, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ShardError(
            f"{store.uri}/{name} is damaged ({printable(summarize(error))}): remove it and run the same command again."
        ) from error


def begin(plan: ShardPlan, store: ObjectStore) -> list[int] | None:
    """The shards that have to be built; None where the set is complete. Writes the recipe where nothing was begun.

    Raises ShardError where the store holds something else, with what differs.
    """
    if store.size(INFO_NAME) is not None:
        _check_recipe(plan, dict(read_info(store.uri).recipe), f"{store.uri} holds a finished set")
        _remove_state(store)
        return None
    names = store.names()
    if RECIPE_NAME in names:
        _check_recipe(plan, _read_recipe(store), f"{store.uri} holds an unfinished set")
    elif foreign := [name for name in names if not name.startswith(f"{STATE_FOLDER}/")]:
        raise ShardError(f"{store.uri} is not empty: it holds {foreign[0]}; name another folder.")
    else:
        store.write(RECIPE_NAME, json.dumps(plan.recipe(), indent=2).encode())
    present = set(names)
    # Someone may have removed a shard whose record is still there.
    return [s for s in range(plan.shards) if _built_name(s) not in present or shard_name(s) not in present]


def _read_recipe(store: ObjectStore) -> dict[str, Any]:
    try:
        return parse_object(store.read(RECIPE_NAME).decode())
    except ValueError as error:
        raise ShardError(
            f"{store.uri}/{RECIPE_NAME} is damaged ({error}): remove what is in the folder, or name another one."
        ) from error


def _check_recipe(plan: ShardPlan, recorded: dict[str, Any], state: str) -> None:
    recipe = plan.recipe()
    if recorded == json.loads(json.dumps(recipe)):
        return
    differences = ", ".join(
        f"{name} {_shorten(recorded.get(name))} instead of {_shorten(recipe[name])}"
        for name in recipe
        if recorded.get(name) != recipe[name]
    )
    raise ShardError(
        f"{state} of other settings ({differences or 'of another version'}); name another folder or remove it."
    )


def _shorten(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else repr(value)


def finish(plan: ShardPlan, store: ObjectStore) -> DatasetInfo:
    """Writes index, manifest and `dataset.json` once every shard is built, and returns the description of the set.

    Raises ShardError, StorageError.
    """
    built = [_read_built(store, shard) for shard in range(plan.shards)]
    left_out = tuple(sorted(name for shard in built for name in shard.left_out))
    info = publish_set(store, replace(plan.info, left_out=left_out), [shard.record for shard in built])
    _remove_state(store)
    return info


def _remove_state(store: ObjectStore) -> None:
    """Removes the state folder, with what a killed worker left in it."""
    if isinstance(store, LocalFolder):
        shutil.rmtree(store.path(STATE_FOLDER), ignore_errors=True)
        return
    for name in store.names():
        if name.startswith(f"{STATE_FOLDER}/"):
            store.remove(name)


@contextmanager
def exclusive(store: ObjectStore) -> Iterator[None]:
    """Locks a store against a second preparation on this machine. Raises ShardError where one is running."""
    key = hashlib.sha256(str(getattr(store, "folder", store.uri)).encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir(), f"soflow-{os.getuid()}-{key}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{store.uri} is being prepared by another process on this machine.") from None
        yield
