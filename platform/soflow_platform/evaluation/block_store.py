"""Block files of a statistics job: each complete or absent, merged into one file at the end."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from soflow_pipelines.metrics.score_statistics import ScoreStatistics
from soflow_pipelines.references.statistics_job import StatisticsJob
from soflow_pipelines.storage.files import write_bytes
from soflow_platform.storage.code_digest import running_code

MERGED = "statistics.npz"


@dataclass(frozen=True)
class BlockStore:
    """Folder with the block files of one job, or with the file of the merged statistics that replaces them."""

    folder: Path
    job: StatisticsJob

    @classmethod
    def of(cls, job: StatisticsJob, root: Path) -> BlockStore:
        """The folder of a job below `root`, for the code of this process; nothing is created."""
        return cls(root / f"{job.key}-{running_code().digest}", job)

    def missing(self) -> list[int]:
        """Blocks that are still to be computed."""
        if (self.folder / MERGED).exists():
            return []
        return [block for block in range(self.job.blocks) if not self._path(block).exists()]

    def publish(self, block: int, statistics: ScoreStatistics) -> None:
        """Write the file of a block atomically."""
        _save(self._path(block), statistics)

    def whole(self) -> ScoreStatistics:
        """The statistics of all blocks, merged in order; their file replaces those of the blocks."""
        path = self.folder / MERGED
        if not path.exists():
            try:
                _save(path, self._merged())
            except FileNotFoundError:
                # Another command may have merged the blocks and removed them meanwhile.
                if not path.exists():
                    raise
        for block in range(self.job.blocks):
            self._path(block).unlink(missing_ok=True)
        return _load(path)

    def _merged(self) -> ScoreStatistics:
        whole = _load(self._path(0))
        for block in range(1, self.job.blocks):
            whole.merge(_load(self._path(block)))
        return whole

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:06d}.npz"


def _save(path: Path, statistics: ScoreStatistics) -> None:
    content = io.BytesIO()
    np.savez(content, **statistics.state())  # type: ignore[arg-type]
    write_bytes(path, content.getvalue())


def _load(path: Path) -> ScoreStatistics:
    with np.load(path) as arrays:
        return ScoreStatistics.from_state(dict(arrays))
