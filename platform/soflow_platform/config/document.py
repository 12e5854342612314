"""YAML documents that keep the file and line of every value.

A `Document` is the merged content of a YAML file, of the files it `extends`, and of `--set` overrides, together
with the origin (file and line) of every key, so that a refused value can be pointed at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from soflow_platform.errors import UserError

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its surprises: `1e-4` is a number, `on` and `no` are words."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":bool"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|nan))$"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file and its line, or an override on the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}, line {self.line}"


@dataclass
class Document:
    """`data`: nested dicts, lists and scalars. `origins`: for each path into them, where it was written."""

    data: dict[str, Any]
    origins: dict[KeyPath, Origin] = field(default_factory=dict)

    def origin(self, path: Iterable[str | int]) -> Origin:
        """The origin of `path`, or of the nearest enclosing key that was written."""
        path = tuple(path)
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, Origin("the sweep"))

    def get(self, path: Iterable[Any]) -> Any:
        """The value at `path`. Raises KeyError where there is none."""
        value: Any = self.data
        for key in path:
            if isinstance(value, dict) or (
                isinstance(value, list) and isinstance(key, int) and key < len(value)
            ):
                value = value[key]
            else:
                raise KeyError(key)
        return value

    def put(self, path: KeyPath, value: Any, origin: Origin) -> None:
        """Set one value, making the sections above it where they are missing."""
        section: dict[Any, Any] = self.data
        for depth, key in enumerate(path[:-1]):
            below = section.get(key)
            if not isinstance(below, dict):
                below = section[key] = {}
                self.origins[path[: depth + 1]] = origin
            section = below
        for known in [p for p in self.origins if p[: len(path)] == path]:
            del self.origins[known]
        section[path[-1]] = value
        self._mark(path, value, origin)

    def _mark(self, path: KeyPath, value: Any, origin: Origin) -> None:
        self.origins[path] = origin
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, below in items:
            self._mark((*path, key), below, origin)

    def merge(self, other: Document) -> None:
        """Lay `other` over this document: sections are merged key by key, anything else is replaced."""

        def lay(path: KeyPath, value: Any) -> None:
            try:
                present = self.get(path)
            except KeyError:
                present = None
            if isinstance(value, dict) and isinstance(present, dict) and _same_method(value, present):
                for key, below in value.items():
                    lay((*path, key), below)
                return
            self.put(path, value, other.origin(path))
            for known, origin in other.origins.items():
                if known[: len(path)] == path:
                    self.origins[known] = origin

        for key, value in other.data.items():
            lay((key,), value)


def read_document(path: Path, overrides: Iterable[str] = ()) -> Document:
    """Read a sweep file, what it extends, and `a.b=value` overrides.

    Raises UserError for a file that cannot be read or parsed, a key given twice, or a circle of `extends`.
    """
    document = _read_with_parents(path, ())
    for override in overrides:
        apply_override(document, override)
    return document


def apply_override(document: Document, override: str) -> None:
    """Apply one `a.b=value`; the value is read as YAML. Raises UserError where it has no such form."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {override!r} is not of the form section.key=value.")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: the value cannot be read as YAML; quote it.") from None
    document.put(tuple(key.split(".")), value, Origin(f"--set {key}"))


def _read_with_parents(path: Path, below: tuple[Path, ...]) -> Document:
    path = path.resolve()
    if path in below:
        raise UserError(
            f"{path.name}: `extends` goes in a circle: {' -> '.join(p.name for p in (*below, path))}."
        )
    own = _read_one(path)
    parents = own.data.pop("extends", [])
    document = Document({})
    for parent in parents if isinstance(parents, list) else [parents]:
        document.merge(_read_with_parents(path.parent / str(parent), (*below, path)))
    document.merge(own)
    return document


def _read_one(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{_shown(path)} cannot be read: {reason}.") from None
    try:
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(f"{_shown(path)}{where}: {problem}.") from None
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{_shown(path)} holds no settings: a sweep file is a mapping of sections.")
    document = Document({})
    loader = _Loader("")
    document.data = _construct(loader, node, (), _shown(path), document.origins)
    return document


def _construct(
    loader: _Loader, node: yaml.Node, path: KeyPath, source: str, origins: dict[KeyPath, Origin]
) -> Any:
    if path:
        origins[path] = Origin(source, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        section: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node))
            line = key_node.start_mark.line + 1
            if key in section:
                raise UserError(f"{source}, line {line}: `{key}` is given twice; keep one.")
            place = (*path, key)
            section[key] = _construct(loader, value_node, place, source, origins)
            origins[place] = Origin(source, line)
        return section
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*path, i), source, origins) for i, item in enumerate(node.value)]
    return loader.construct_object(node)


def _same_method(over: dict[str, Any], under: dict[str, Any]) -> bool:
    """Whether two sections can be merged: an objective of another method shares no keys with the one below."""
    return over.get("method", under.get("method")) == under.get("method", over.get("method"))


def _shown(path: Path) -> str:
    """A path as the user would type it: relative to the working folder where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
