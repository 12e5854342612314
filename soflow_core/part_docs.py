"""Settings of a dataclass or model as documentation: name, type, default, and the docstring below the field in its source."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from soflow_core.settings import PARTS, SECTIONS

ABSENT = object()
"""The default of a setting that must be given."""


@dataclass(frozen=True)
class SettingDoc:
    """One setting; those of a nested dataclass have dotted names."""

    name: str
    annotation: str
    """Its type as the source has it."""
    default: Any
    text: str
    """Its docstring in one line; empty where it has none."""
    known: tuple[str, ...] = ()
    """Names of the parts that it may name."""


def summary(part: type) -> str:
    """The first line of a class's docstring."""
    return next(iter(inspect.cleandoc(part.__doc__ or "").splitlines()), "")


def settings_of(part: type, prefix: str = "") -> list[SettingDoc]:
    """The settings of a dataclass or a pydantic model, those of nested dataclasses by dotted names."""
    found = []
    sources, registries = _sources(part), _registries(part)
    for name, default in _defaults(part).items():
        annotation, text = sources.get(name, ("", ""))
        if dataclasses.is_dataclass(default) and not isinstance(default, type) and not prefix:
            if name in registries:
                field = registries[name].field
                kind = getattr(default, field)
                found.append(SettingDoc(f"{name}.{field}", annotation, kind, text, tuple(registries[name])))
            found += settings_of(type(default), f"{prefix}{name}.")
            continue
        known = tuple(registries.get(name, ()))
        found.append(SettingDoc(f"{prefix}{name}", annotation, default, text, known))
    return found


def _defaults(part: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(part):
        return {each.name: _default(each) for each in dataclasses.fields(part) if each.init}
    fields = part.model_fields
    return {
        name: ABSENT if each.is_required() else each.get_default(call_default_factory=True)
        for name, each in fields.items()
    }


def _registries(part: Any) -> dict[str, Any]:
    """The registry of each field of a dataclass that names a part, or that is a section of one."""
    if not dataclasses.is_dataclass(part):
        return {}
    hints = get_type_hints(part)
    found = {}
    for each in dataclasses.fields(part):
        hint = hints[each.name]
        section = next((SECTIONS[kind] for kind in (hint, *get_args(hint)) if kind in SECTIONS), None)
        registry = each.metadata.get(PARTS, section)
        if registry is not None:
            found[each.name] = registry
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ABSENT if field.default is dataclasses.MISSING else field.default


@functools.cache
def _sources(part: type) -> dict[str, tuple[str, str]]:
    """Annotation and docstring of each field in the source of a class and its bases."""
    found: dict[str, tuple[str, str]] = {}
    for kind in reversed(part.__mro__):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        except (OSError, TypeError, SyntaxError, ValueError):
            # Built in, or made without a file.
            continue
        if isinstance(body, ast.ClassDef):
            found |= _fields(body)
    return found


def _fields(body: ast.ClassDef) -> dict[str, tuple[str, str]]:
    found = {}
    for place, node in enumerate(body.body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        after = body.body[place + 1] if place + 1 < len(body.body) else None
        text = ""
        if (
            isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            text = " ".join(after.value.value.split())
        found[node.target.id] = (ast.unparse(node.annotation), text)
    return found
