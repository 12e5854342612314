"""What the numbers of shards and samples cost: start-up, memory of the index, a step's rows, and the loader's first batch.

    python benchmarks/shard_count.py                                          # 10 and 1,000 shards, 100,000 samples
    python benchmarks/shard_count.py --sets 10:1280000 1000:1280000 100000:1280000 100000:100000000
    python benchmarks/shard_count.py --sets 100000:1280000 --to 's3://bucket/prefix?endpoint_override=HOST:PORT&scheme=http'

Sets are simulated: all shards of a set are links to one file, so that an index of any size points to real samples (of shape (1, 8, 8)).
Each is measured in a process of its own. `start-up` opens the tables and the loader; `bytes of a sample` is what the index keeps of
each; `memory` is all that stays, that of the shards included, and `peak` the most that start-up takes, both beyond a process that has
read a set of ten samples. `step` reads 256 samples, in the order of training, out of the page cache; `rows` is the part of it that
decides which. In S3 only the tables are uploaded, and
start-up alone is measured: it lists nothing and asks for no shard. Bars: 16 bytes a sample, 10 s for 100,000 shards in S3.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from soflow_pipelines.shards.cache import ShardCache
from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.order import SampleOrder
from soflow_pipelines.shards.tables import (
    INDEX_NAME,
    INDEX_SCHEMA,
    MANIFEST_NAME,
    MANIFEST_SCHEMA,
    read_index,
    read_info,
    read_manifest,
)
from soflow_pipelines.shards.writer import Sample, write_shards
from soflow_pipelines.storage.opening import open_storage

SHAPE, BATCH, STEPS = (1, 8, 8), 256, 40
INFO = DatasetInfo(kind="pixels", shape=SHAPE, dtype="uint8", classes=10)
INDEX_BYTES, REMOTE_SECONDS = 16, 10.0
GROUP_ROWS = 2**20


def write_set(folder: Path, shards: int, samples: int) -> None:
    """A set whose shards are links to the first one."""
    each = samples // shards
    rng = np.random.default_rng(0)
    write_shards(
        (Sample(f"{n:08d}", rng.integers(0, 256, SHAPE).astype(np.uint8), n % 10) for n in range(each)),
        folder,
        INFO,
        per_shard=each,
    )
    (record,) = read_manifest(folder)
    rows = read_index(folder)
    names = [f"shard-{number:06d}.tar" for number in range(shards)]
    assert names[0] == record.name
    for name in names[1:]:
        (folder / name).symlink_to(record.name)
    # Not packed: rows that repeat would be taken for a file that unpacks without end.
    packing = {"compression": "none", "use_dictionary": False}
    with pq.ParquetWriter(folder / INDEX_NAME, INDEX_SCHEMA, **packing) as writer:
        at_once = max(1, GROUP_ROWS // each)
        for first in range(0, shards, at_once):
            numbers = np.arange(first, min(first + at_once, shards), dtype=np.int32)
            group = pa.concat_tables([rows] * len(numbers)).combine_chunks()
            place = group.schema.get_field_index("shard")
            writer.write_table(group.set_column(place, "shard", pa.array(np.repeat(numbers, each))))
    manifest = {
        "shard": names,
        "samples": [each] * shards,
        "bytes": [record.bytes] * shards,
        "sha256": [record.sha256] * shards,
        "label_counts": [list(record.label_counts.items())] * shards,
    }
    pq.write_table(pa.table(manifest, schema=MANIFEST_SCHEMA), folder / MANIFEST_NAME, compression="zstd")
    info: dict[str, Any] = json.loads((folder / INFO_NAME).read_text())
    counts = {"samples": each * shards, "shards": shards, "bytes": record.bytes * shards}
    (folder / INFO_NAME).write_text(json.dumps({**info, **counts}))


def resident_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def median_ms(work: Any) -> float:
    taken = []
    for number in range(STEPS):
        started = time.perf_counter()
        work(number)
        taken.append(time.perf_counter() - started)
    return 1e3 * statistics.median(taken[STEPS // 4 :])


def measure(uri: str, small: str) -> dict[str, float]:
    """The numbers of one set, in this process; `small` is a set from which everything has been read once."""
    with ShardLoader(small, 2, threads=0) as first:
        next(first)
    before, peak = resident_bytes(), peak_bytes()
    remote = "://" in uri
    with tempfile.TemporaryDirectory() as folder:
        cache = ShardCache(Path(folder), 64 * 10**9) if remote else None
        started = time.perf_counter()
        with ShardLoader(uri, BATCH, threads=0, cache=cache) as loader:
            found = {"start-up s": time.perf_counter() - started}
            arrays = (value for value in vars(loader._samples).values() if isinstance(value, np.ndarray))
            index = sum(array.nbytes for array in arrays if len(array) == loader.epoch_samples)
            found["bytes of a sample"] = index / loader.epoch_samples
            found["memory MB"] = (resident_bytes() - before) / 1e6
            found["peak MB"] = (peak_bytes() - peak) / 1e6
            if not remote:
                started = time.perf_counter()
                next(loader)
                found["first batch ms"] = 1e3 * (time.perf_counter() - started)
                found["step ms"] = median_ms(lambda _: next(loader))
                shards = read_manifest(uri, label_counts=False)
                order = SampleOrder([s.samples for s in shards], [s.bytes for s in shards], 0)
                order.rows(np.arange(BATCH))
                found["rows ms"] = median_ms(
                    lambda number: order.rows(np.arange(number * BATCH, (number + 1) * BATCH))
                )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", default=["10:100000", "1000:100000"], metavar="SHARDS:SAMPLES")
    parser.add_argument("--to", metavar="URI", help="upload the tables, and measure start-up from there")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return 0
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small"
        write_set(small, 1, 10)
        columns: list[str] = []
        for text in options.sets:
            shards, samples = (int(number) for number in text.split(":"))
            local = Path(folder) / text.replace(":", "-")
            write_set(local, shards, samples)
            uri = str(local)
            if options.to:
                place, mark, query = options.to.partition("?")
                uri = f"{place.rstrip('/')}/{local.name}{mark}{query}"
                for name in (INDEX_NAME, MANIFEST_NAME, INFO_NAME):
                    open_storage(uri).write(name, (local / name).read_bytes())
                assert read_info(uri).shards == shards
            command = [sys.executable, __file__, "--measure", uri, str(small)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout)
            if not columns:
                columns = list(found)
                print(f"| shards, samples | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
            print(
                f"| {shards:,} of {samples:,} | {' | '.join(f'{found[name]:.2f}' for name in columns)} |",
                flush=True,
            )
            if found["bytes of a sample"] > INDEX_BYTES:
                missed.append(
                    f"{text}: {found['bytes of a sample']:.1f} bytes a sample, {INDEX_BYTES} are the bar"
                )
            if options.to and found["start-up s"] > REMOTE_SECONDS:
                missed.append(
                    f"{text}: start-up in {found['start-up s']:.1f} s, {REMOTE_SECONDS:g} are the bar"
                )
    for line in missed:
        print(f"MISSED {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
