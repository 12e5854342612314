"""Labels as they stand in files from elsewhere, and the classes they make."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soflow_core.failures import printable
from soflow_pipelines.shards.schema import MAX_CLASSES
from soflow_pipelines.sources.source import SourceError

WHOLE_NUMBER = re.compile(rb"\s*[0-9]{1,18}\s*")
LABEL_FIELDS = ("label", "class", "cls")
"""Fields of a JSON object that hold its label, in the order in which they are looked for."""
LABEL_BYTES = 1 << 20
"""Bytes of a member with a label that are read."""


def parse_number(content: bytes) -> int | None:
    """A label written as decimal digits; None where it is anything else, such as a negative number or `1_0`."""
    return int(content) if WHOLE_NUMBER.fullmatch(content) else None


class JsonLabels:
    """Reads the labels of JSON texts: numbers, texts, or a field of objects; notes which fields they are from."""

    def __init__(self, wanted: str | None = None) -> None:
        self._wanted = wanted
        self._used: set[str] = set()
        self._differing: set[str] = set()
        """Fields that might have held the label as well, and hold something else."""

    def __call__(self, content: bytes) -> int | str | None:
        """The label in a JSON text; None where there is none."""
        try:
            value: Any = json.loads(content)
        except (ValueError, RecursionError):
            return None
        if isinstance(value, dict):
            fields = [field for field in (self._wanted,) if field] or LABEL_FIELDS
            present = [field for field in fields if field in value]
            if not present:
                return None
            self._used.add(present[0])
            self._differing |= {field for field in present if value[field] != value[present[0]]}
            value = value[present[0]]
        if isinstance(value, bool) or not isinstance(value, int | str):
            return None
        return value

    def describe(self, extension: str) -> str:
        """Where the labels are from, in words: the extension, the fields, and fields that hold other labels."""
        names = [printable(field) for field in (self._wanted, *LABEL_FIELDS) if field in self._used]
        origin = f".{extension}"
        if names:
            origin = f"{' or '.join(f'`{name}`' for name in dict.fromkeys(names))} in {origin}"
        others = [field for field in LABEL_FIELDS if field in self._differing - self._used]
        if not others:
            return origin
        return f"{origin}, where `{others[0]}` holds others: --label-key {extension}:{others[0]} takes those"


def number_labels(values: Sequence[int | str], name: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Integer labels as they are, with numbers as class names; texts are numbered in their order.

    Raises SourceError where both kinds come, and for numbers that are no class.
    """
    if all(isinstance(value, int) for value in values):
        beyond = next(
            (value for value in values if isinstance(value, int) and not 0 <= value < MAX_CLASSES), None
        )
        if beyond is not None:
            shown = printable(beyond) if abs(int(beyond)) < 10**20 else "of many digits"
            raise SourceError(
                f"{name}: the label {shown} is none of 0 to {MAX_CLASSES - 1}: number the classes from 0."
            )
        labels = np.array(values, np.int64)
        return labels, tuple(str(label) for label in range(int(labels.max()) + 1))
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) != len(values):
        raise SourceError(
            f"{name}: some labels are numbers and some are texts, such as {printable(texts[0][:40])!r}."
        )
    names = sorted(set(texts))
    if len(names) > MAX_CLASSES:
        raise SourceError(f"{name}: {len(names)} different labels, more than {MAX_CLASSES} classes.")
    return np.searchsorted(np.array(names, object), np.array(texts, object)).astype(np.int64), tuple(names)
