"""Files of a folder as a source sees them: each folder once, hidden files and leftovers of other systems passed over."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from soflow_pipelines.sources.source import SourceError

LEFTOVERS = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"})
"""Names that macOS and Windows leave in folders and archives."""


def is_leftover(path: str) -> bool:
    """Whether a part of a path is hidden (`.DS_Store`, `._photo.jpg`, `.cache/`) or a leftover of macOS or Windows."""
    return any(
        part in LEFTOVERS or (part.startswith(".") and part not in (".", "..")) for part in path.split("/")
    )


@dataclass
class Listing:
    """The files below a folder."""

    files: list[tuple[str, int]] = field(default_factory=list)
    """Path below the folder, with `/`, and bytes. UNREADABLE for what is no file, or a link that leads nowhere."""
    passed_over: int = 0
    """Hidden files and folders, leftovers, and links to folders that are listed already."""
    outside: list[str] = field(default_factory=list)
    """Links that lead out of the folder."""


UNREADABLE = -1
"""Size of a pipe, a device, a link that leads nowhere, or a file that may not be looked at."""


def list_folder(root: Path, follow_links: bool = True) -> Listing:
    """Lists the files below a folder, sorted by path.

    Every folder is listed once, so that links cannot make a loop or multiply images: where it lies, before where links lead to
    it. Raises SourceError for links that lead out of the folder where they are not to be followed, and where the folder cannot
    be read.
    """
    listing = Listing()
    base = os.path.realpath(root)
    try:
        seen = {_identity(base)}
        links = _walk(base, "", base, listing, seen)
        while links:
            path = links.pop(0)
            folder = os.path.join(base, path)
            identity = _identity(folder)
            if identity in seen:
                listing.passed_over += 1
                continue
            seen.add(identity)
            links += _walk(folder, f"{path}/", base, listing, seen)
    except OSError as error:
        raise SourceError(f"{root} cannot be read: {error}.") from error
    if listing.outside and not follow_links:
        raise SourceError(
            f"{root} has {len(listing.outside)} links that lead out of it, such as {listing.outside[0]}: pass --follow-links to "
            "take what they lead to, or remove them."
        )
    listing.files.sort()
    return listing


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _walk(folder: str, prefix: str, base: str, listing: Listing, seen: set[tuple[int, int]]) -> list[str]:
    """Lists a folder and the real folders below it; returns the links to folders that were met, as paths below the base."""
    links: list[str] = []
    pending = [(folder, prefix)]
    while pending:
        folder, prefix = pending.pop()
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            path = f"{prefix}{entry.name}"
            if is_leftover(entry.name):
                listing.passed_over += 1
            elif entry.is_dir(follow_symlinks=False):
                identity = _identity(entry.path)
                if identity in seen:
                    listing.passed_over += 1
                    continue
                seen.add(identity)
                pending.append((entry.path, f"{path}/"))
            elif entry.is_symlink():
                _list_link(entry, path, base, listing, links)
            else:
                listing.files.append((path, _size(entry.path)))
    return links


def _list_link(entry: os.DirEntry[str], path: str, base: str, listing: Listing, links: list[str]) -> None:
    target = os.path.realpath(entry.path)
    if os.path.exists(target) and os.path.commonpath([base, target]) != base:
        listing.outside.append(path)
    if os.path.isdir(target):
        links.append(path)
    else:
        listing.files.append((path, _size(entry.path)))


def _size(path: str) -> int:
    try:
        status = os.stat(path)
    except OSError:
        return UNREADABLE
    return status.st_size if stat.S_ISREG(status.st_mode) else UNREADABLE


def refuse_foreign_folder(folder: Path, names: Iterable[str]) -> None:
    """Raises SourceError, which says what to do, for a folder in a format that is known and not read."""
    present = set(names)
    if "data.mdb" in present:
        raise SourceError(
            f"{folder} is an LMDB: write its images to a folder, a zip file or Parquet and give that."
        )
    if "state.json" in present or "dataset_dict.json" in present:
        raise SourceError(
            f"{folder} was written by `datasets.save_to_disk`: write Parquet with `load_from_disk(...).to_parquet(...)`, one file "
            "for each split, and give that."
        )
    refuse_foreign_files(folder, present)


HDF5_SUFFIXES = (".h5", ".hdf5")
FOREIGN = {
    (".arrow", ".feather"): "Arrow",
    (".lmdb", ".mdb"): "LMDB",
    (".tfrecord", ".tfrecords"): "TFRecord",
    (".npz", ".npy"): "numpy's format",
    (".pkl", ".pickle", ".pt", ".pth"): "a pickle, which may hold code,",
    (".rar", ".7z"): "an archive of another kind",
    (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".gz"): "a compressed tar file",
}
"""Endings of files that are known and not read."""


def refuse_foreign_files(place: Path, names: Iterable[str]) -> None:
    """Raises SourceError, which says what to do, where a file is in a format that is known and not read."""
    for name in sorted(names):
        if name.lower().endswith(HDF5_SUFFIXES):
            raise SourceError(
                f"{place} holds HDF5 ({name}): a file of latents is read where it is named itself; write images to class folders, a "
                "zip file, Parquet or WebDataset tars."
            )
        for endings, kind in FOREIGN.items():
            if name.lower().endswith(endings):
                raise SourceError(
                    f"{place} is or holds {kind} ({name}), which is not read: write the images to class folders, a zip file, Parquet "
                    "or WebDataset tars (not compressed) and give those."
                )
