"""Checks a sweep document against the schema: unknown keys first, then values; errors name file and line in one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Union

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from soflow_core.objectives import OBJECTIVES
from soflow_core.plugins import VARIABLE, PluginError, load
from soflow_platform.config.document import Document, KeyPath, Origin, read_document, shortened
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.parts import PartOf, part_of
from soflow_platform.errors import UserError


def read_experiment(path: Path, overrides: tuple[str, ...] = ()) -> tuple[Experiment, Document]:
    """Read and check a sweep file. Raises UserError naming the first thing wrong with file and line."""
    document = read_document(path, overrides)
    return validate(document), document


def validate(document: Document) -> Experiment:
    """Check a document. Raises UserError: unknown keys first, with the nearest known name, then values."""
    _load_plugins(document)
    _refuse_unknown_keys(document, Experiment, document.data, ())
    try:
        return Experiment(**document.data)
    except ValidationError as error:
        raise UserError(_sentence(document, error)) from None


def resolved_experiment(settings: Mapping[str, Any], where: str) -> Experiment:
    """The experiment of a record's resolved settings. Raises UserError, beginning with `where`, for what this version cannot read."""
    try:
        return Experiment(**settings)
    except PluginError as error:
        raise UserError(f"{where}: {error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise UserError(
            f"{where} cannot be read: `{key}`: {message[:1].lower()}{message[1:]}; what registers it is a plugin that is not here, "
            f"or it was made by another version: name the plugin in {VARIABLE}."
        ) from None


def _load_plugins(document: Document) -> None:
    """Imports the plugins, which register what the other sections may name. Raises UserError with file and line."""
    given = document.data.get("plugins")
    for number, reference in enumerate(given if isinstance(given, list) else ()):
        if isinstance(reference, str):
            try:
                load(reference)
            except PluginError as error:
                raise UserError(f"{document.origin(('plugins', number))}: {error}.") from error.__cause__


def _sentence(document: Document, error: ValidationError) -> str:
    errors = error.errors()
    # A mapping where a list or a number may stand, or a mapping: what is wrong inside the mapping.
    inside = (
        each
        for each in errors
        if each["type"] not in ("list_type", "float_type", "literal_error")
        or not isinstance(each["input"], dict)
    )
    first = next(inside, errors[0])
    path = _document_path(document, first["loc"])
    key = ".".join(str(part) for part in path)
    where = document.origin(path) if path else document.origin(("name",))
    source = where if path else where.source
    if first["type"] == "missing":
        return f"{source}: `{'.'.join(map(str, (*path, first['loc'][-1])))}` is missing."
    if first["type"] == "union_tag_invalid":
        field, tag, expected = (first["ctx"][name] for name in ("discriminator", "tag", "expected_tags"))
        return f"{document.origin((*path, field))}: unknown {field} {shortened(tag)!r} in `{key}`; known are {expected}."
    if first["type"] == "union_tag_not_found":
        return f"{source}: `{key}.{first['ctx']['discriminator']}` is missing; known are {', '.join(OBJECTIVES)}."
    message = re.sub(r"^[A-Z]\w*\.(?=\w+ is )", "", first["msg"].removeprefix("Value error, ")).rstrip(".")
    message = message[:1].lower() + message[1:]
    if first["type"] == "value_error":
        source = where_written(document, message, path) or source
        return f"{source}: {f'`{key}`: ' if key else ''}{message}."
    return f"{source}: `{key}` is {shortened(repr(first['input']))}: {message}."


def where_written(document: Document, message: str, path: KeyPath = ()) -> Origin | None:
    """Where the setting was written that a message about the section at `path` names.

    Of several, it is the one that was laid over the others: an override, then the file itself, then what it extends. None where the
    message names none that was written.
    """
    words = set(re.findall(r"[a-z_][a-z0-9_.]*[a-z0-9_]", message))
    named = [
        written
        for written in document.origins
        if len(written) > len(path)
        and written[: len(path)] == path
        and words & _names_of(written, path)
        and isinstance(document.get(written), str | int | float | list)
    ]
    return document.origin(named[-1]) if named else None


def _names_of(written: KeyPath, section: KeyPath) -> set[str]:
    """How messages about a section name a setting below it."""
    names = [part for part in written if isinstance(part, str)]
    dotted = {".".join(names[start:]) for start in range(len(names))}
    # Without its section a setting is named in messages about that section alone.
    return dotted if section else {name for name in dotted if name.count(".") == len(names) - 1 > 0}


def _document_path(document: Document, loc: tuple[str | int, ...]) -> KeyPath:
    """pydantic's location without the parts that are names of union members and not keys."""
    path: KeyPath = ()
    for part in loc:
        try:
            document.get((*path, part))
        except KeyError:
            continue
        path = (*path, part)
    return path


def _refuse_unknown_keys(document: Document, annotation: Any, value: Any, path: KeyPath) -> None:
    if isinstance(value, list):
        for number, each in enumerate(value):
            _refuse_unknown_keys(document, _of_elements(annotation), each, (*path, number))
        return
    fields = _known_fields(annotation, value) if isinstance(value, dict) else None
    if fields is None:
        return
    for key, below in value.items():
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            section = ".".join(str(part) for part in path)
            known = f"did you mean `{nearest[0]}`?" if nearest else f"known are {', '.join(fields)}."
            place = f" in `{section}`" if section else ""
            raise UserError(
                f"{document.origin((*path, key))}: unknown key `{shortened(key)}`{place}; {known}"
            )
        if not isinstance(below, dict):
            _refuse_booleans(document, fields[key], below, (*path, key))
        _refuse_unknown_keys(document, fields[key], below, (*path, key))


def _of_elements(annotation: Any) -> Any:
    """The type of a list's elements; None where it is not one type."""
    members = typing.get_args(annotation)
    if typing.get_origin(annotation) in (tuple, list):
        return members[0]
    return next((found for member in members if (found := _of_elements(member)) is not None), None)


def _refuse_booleans(document: Document, annotation: Any, value: Any, path: KeyPath) -> None:
    """Raises UserError for true or false where neither is a value of the setting: pydantic takes them for 1 and 0."""
    values = value if isinstance(value, list) else [value]
    if any(isinstance(each, bool) for each in values) and not _may_be_boolean(annotation):
        key = ".".join(str(part) for part in path)
        raise UserError(
            f"{document.origin(path)}: `{key}` is {shortened(value)}: true and false are no values of it."
        )


def _may_be_boolean(annotation: Any) -> bool:
    members = typing.get_args(annotation)
    return annotation in (bool, Any) or any(
        _may_be_boolean(member) for member in members if not isinstance(member, bool)
    )


def _known_fields(annotation: Any, value: dict[str, Any]) -> dict[str, Any] | None:
    """Names and types of a section's keys; None for a free mapping, or a part whose name is not given or not known."""
    part = part_of(annotation)
    if part is not None:
        section = part.known(value)
        fields = None if section is None else _known_fields(section, value)
        field = part.registry.field
        return fields if fields is None or field in fields else {field: str, **fields}
    if typing.get_origin(annotation) is Annotated:
        return _known_fields(typing.get_args(annotation)[0], value)
    if typing.get_origin(annotation) in (Union, types.UnionType):
        members = [m for m in typing.get_args(annotation) if m is not type(None)]
        if len(members) > 1:
            sections = [m for m in members if dataclasses.is_dataclass(m)]
            members = sections if len(sections) == 1 else []
        return _known_fields(members[0], value) if members else None
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: _with_part(field) for name, field in annotation.model_fields.items()}
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        hints = typing.get_type_hints(annotation)
        return {f.name: hints[f.name] for f in dataclasses.fields(annotation)}
    return None


def _with_part(field: FieldInfo) -> Any:
    """A field's type, with the registry that it takes a part of."""
    part = next((mark for mark in field.metadata if isinstance(mark, PartOf)), None)
    return field.annotation if part is None else Annotated[field.annotation, part]
