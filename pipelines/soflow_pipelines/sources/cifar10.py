"""The binary archive of CIFAR-10."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

import numpy as np

from soflow_pipelines.sources.source import ArraySource, LabelledImages, SourceError
from soflow_pipelines.sources.tar_files import members_of

LARGEST_BATCH = 200 * 2**20
"""Bytes of a member; CIFAR-10's have 30,730,000."""
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Cifar10Archive(ArraySource):
    """`cifar-10-binary.tar.gz` as its authors publish it; not the Python version, which is a pickle.

    Raises SourceError where it cannot be read or has no batches of the split.
    """

    def __init__(self, path: Path, name: str, split: str) -> None:
        images, labels = [], []
        try:
            with tarfile.open(path) as archive:
                for member in sorted(members_of(archive, path), key=lambda member: member.name):
                    base = Path(member.name).name
                    if not base.endswith(".bin") or base.startswith("data_batch") != (split == "train"):
                        continue
                    opened = archive.extractfile(member)
                    if opened is None or member.size > LARGEST_BATCH:
                        raise ValueError(f"{base} is no batch of CIFAR-10")
                    records = np.frombuffer(opened.read(), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
                    labels.append(records[:, 0].astype(np.int64))
                    images.append(records[:, 1:].reshape(-1, 3, 32, 32))
        except (OSError, tarfile.TarError, EOFError, ValueError, zlib.error) as error:
            raise SourceError(f"{path} cannot be read: {error}.") from error
        if not images:
            raise SourceError(
                f"{path} holds no {split} batches; give cifar-10-binary.tar.gz, a folder or a zip."
            )
        if max(int(batch.max(initial=0)) for batch in labels) >= len(CIFAR10_CLASSES):
            raise SourceError(f"{path} has labels beyond {len(CIFAR10_CLASSES)} classes; it is not CIFAR-10.")
        data = LabelledImages(np.concatenate(images), np.concatenate(labels), CIFAR10_CLASSES)
        super().__init__(name, data)
