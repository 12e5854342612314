"""Which code makes the numbers: digests of the source files that decide a loss, a sample or a score.

They stand in the records of sweeps, in checkpoints, among the tags of runs and registered versions, and in the keys of cached scores,
so that numbers of one version of the code are not taken for those of another.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CODE_TAG = "code.digest"
MIXED_CODE_TAG = "code.mixed"
"""On the run of a sweep that went on with other code: the digests of all code that trained it."""
PACKAGES = (
    "soflow_core",
    "soflow_pipelines",
    "soflow_platform.evaluation",
    "soflow_platform.generation",
    "soflow_platform.training",
)
"""Packages whose code decides numbers; that of commands, records and displays does not."""
CHECKS = "conformance"
"""Folder of a package's checks, which decide no number."""
DIGITS = 12


@dataclass(frozen=True)
class Code:
    """Source files and their digests."""

    files: Mapping[str, str]
    """Path of a file, from the folder of its package's root, and the first hexadecimal digits of the SHA-256 of its content."""

    @property
    def digest(self) -> str:
        """Digest that is equal for equal files."""
        lines = "".join(f"{name} {digest}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()[:DIGITS]

    def differing(self, other: Code) -> list[str]:
        """Files that are not the same in both, by name."""
        names = self.files.keys() | other.files.keys()
        return sorted(
            name
            for name in names
            if self.files.get(name) != other.files.get(name) and CHECKS not in name.split("/")
        )


@functools.cache
def running_code() -> Code:
    """The code of this process, as it is on the disk when this is first called."""
    files: dict[str, str] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            files |= source_files(Path(folder), package.replace(".", "/"))
    return Code(files)


def source_files(folder: Path, name: str) -> dict[str, str]:
    """Digests of the Python files of a package's folder, by path below `name`."""
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()[
            :DIGITS
        ]
        for path in sorted(folder.rglob("*.py"))
        if CHECKS not in path.relative_to(folder).parts
    }


def describe_difference(files: list[str], shown: int = 3) -> str:
    """`a.py and b.py differ`, with the number of those that are not named."""
    named = ", ".join(files[:shown])
    more = f" and {len(files) - shown} more" if len(files) > shown else ""
    return f"{named}{more} {'differs' if len(files) == 1 else 'differ'}"
