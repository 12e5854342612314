"""Reads JSON records (sweep.json, status.json, checkpoint.json), also of earlier and later versions, and refuses damaged ones.

A record may have an integer field `format`, 1 where it is absent. A later version that only adds fields keeps the number: fields that
this version does not know are ignored. A higher number means that the record cannot be understood without the new fields.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union

from soflow_core.failures import InputError
from soflow_pipelines.storage.files import read_json

T = TypeVar("T")

FORMAT = 1
"""The newest format of records that this version reads."""


def read_record(path: Path, record_class: type[T], optional: Sequence[str] = ()) -> T | None:
    """The record in a file; None where there is none. Fields in `optional` take their default where their type is wrong.

    Raises InputError where the file holds no such record, or one of a newer format.
    """
    try:
        content = read_json(path)
    except ValueError:
        raise InputError(f"{path} is damaged: it is no JSON file.") from None
    return None if content is None else record_of(content, record_class, str(path), optional)


def record_of(content: Any, record_class: type[T], place: str, optional: Sequence[str] = ()) -> T:
    """The record in a JSON object; `place` names it in an error. Raises as `read_record` does."""
    if not isinstance(content, Mapping):
        raise InputError(f"{place} is damaged: it holds no JSON object.")
    refuse_newer_format(content, place)
    hints = typing.get_type_hints(record_class)
    values = {}
    for each in fields(record_class):  # type: ignore[arg-type]
        if each.name not in content:
            continue
        try:
            values[each.name] = _value(content[each.name], hints[each.name])
        except ValueError as error:
            if each.name not in optional:
                raise InputError(f"{place} is damaged: `{each.name}` is {error}.") from None
    try:
        return record_class(**values)
    except TypeError as error:
        missing = str(error).rpartition(": ")[2]
        raise InputError(f"{place} is damaged: it lacks {missing}.") from None


def refuse_newer_format(content: Mapping[str, Any], place: str, newest: int = FORMAT) -> None:
    """Raises InputError where a record has a format that this version does not read."""
    written = content.get("format", 1)
    if not isinstance(written, int) or written > newest:
        raise InputError(
            f"{place} is of format {written!r} and this version of soflow reads {newest}: use a newer soflow."
        )


def _value(value: Any, hint: Any) -> Any:
    """A JSON value as its field's type. Raises ValueError where it is of another."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        try:
            return hint(value)
        except ValueError:
            raise ValueError(repr(value)) from None
    if not _is_of(value, hint):
        raise ValueError(repr(value))
    return value


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type; whole numbers are floats too, true and false are no numbers."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(_is_of(value, member) for member in typing.get_args(hint))
    if hint is Any:
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else typing.get_origin(hint) or hint)
