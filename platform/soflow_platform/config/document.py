"""YAML documents that keep the file and line of every value.

A `Document` is the merged content of a YAML file, of the files it `extends`, and of `--set` overrides, together
with the origin (file and line) of every key, so that a refused value can be pointed at.

Two tags say how a file differs from what it extends: `key: !drop` takes a key away, and `section: !replace {...}` replaces a section
as a whole, where sections are otherwise merged key by key.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from soflow_core.failures import summarize
from soflow_platform.config.presets import find_sweep
from soflow_platform.errors import UserError

KeyPath = tuple[str | int, ...]

MAX_BYTES = 2**18
"""Bytes of a sweep file."""
MAX_VALUES = 10_000
"""Values of a sweep file or an override, with aliases written out."""
MAX_DEPTH = 32
"""Sections and lists inside each other."""
MAX_BRACKETS = 100
"""Open brackets in a text; the YAML reader takes seconds for thousands."""
MAX_FILES = 64
"""Files that one sweep file extends, directly or through others."""
SHOWN = 80
"""Characters of a value that an error shows."""
SEARCH_SPACE = ("search", "space")
"""The section whose keys are paths of settings."""
DROP, REPLACE = "!drop", "!replace"
"""Tags of a key that is taken away, and of a section that replaces the one below it."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its surprises: `1e-4` is a number, `on` and `no` are words, `010` is ten and `1:30` no number.

    `{a: !drop}` needs no space after the tag.
    """

    def scan_tag(self) -> yaml.TagToken:
        start = self.get_mark()
        for tag in (DROP, REPLACE):
            if self.prefix(len(tag)) == tag and self.peek(len(tag)) in ",]}{":
                self.forward(len(tag))
                return yaml.TagToken(("!", tag[1:]), start, self.get_mark())
        return super().scan_tag()


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":bool", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"),
    list("-+0123456789"),
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
    dropped: set[KeyPath] = field(default_factory=set)
    """Keys that are to be taken away from the document which this one is laid over; they are not in `data`."""
    replacing: set[KeyPath] = field(default_factory=set)
    """Sections that replace those of the document which this one is laid over."""

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
        self._put(path, value, lambda _: origin)

    def _put(self, path: KeyPath, value: Any, origin_of: Callable[[KeyPath], Origin]) -> None:
        section: dict[Any, Any] = self.data
        for depth, key in enumerate(path[:-1]):
            below = section.get(key)
            if not isinstance(below, dict):
                below = section[key] = {}
                self.origins[path[: depth + 1]] = origin_of(path)
            section = below
        for known in _paths(path, section.get(path[-1])):
            self.origins.pop(known, None)
        section[path[-1]] = value
        for new in _paths(path, value):
            self.origins[new] = origin_of(new)

    def drop(self, path: KeyPath, origin: Origin) -> None:
        """Take away one key with what is below it. Raises UserError, pointing at `origin`, where there is none."""
        try:
            dropped = self.get(path)
            section = self.get(path[:-1])
        except KeyError:
            key = ".".join(map(str, path))
            raise UserError(
                f"{origin}: `{shortened(key)}` cannot be dropped, for no file that this one extends has it; leave it out."
            ) from None
        for known in _paths(path, dropped):
            self.origins.pop(known, None)
        del section[path[-1]]

    def merge(self, other: Document) -> None:
        """Lay `other` over this document: sections are merged key by key, anything else is replaced, and what `other` drops is gone.

        Raises UserError where `other` drops a key that is not in this document.
        """

        def lay(path: KeyPath, value: Any) -> None:
            try:
                present = self.get(path)
            except KeyError:
                present = None
            merged = isinstance(value, dict) and isinstance(present, dict) and path not in other.replacing
            if merged and _same_part(path, value, present):
                for key, below in value.items():
                    lay((*path, key), below)
                return
            self._put(path, value, other.origin)

        for path in sorted(other.dropped, key=len):
            self.drop(path, other.origin(path))
        for key, value in other.data.items():
            lay((key,), value)


def _paths(path: KeyPath, value: Any) -> Iterator[KeyPath]:
    """The path of a value, and those of all values below it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from _paths((*path, key), below)


def read_document(path: Path, overrides: Iterable[str] = ()) -> Document:
    """Read a sweep file, what it extends, and `a.b=value` overrides.

    Raises UserError for a file that cannot be read or parsed or is larger than a sweep file can be, a key given twice, or a circle
    of `extends`.
    """
    document = _read_with_parents(path, (), itertools.count(1))
    for override in overrides:
        apply_override(document, override)
    return document


def apply_override(document: Document, override: str) -> None:
    """Apply one `a.b=value`; the value is read as YAML. Raises UserError where it has no such form."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {shortened(override)!r} is not of the form section.key=value.")
    names = key.split(".")
    if len(names) > MAX_DEPTH:
        raise UserError(f"--set {shortened(key)}: no setting lies {len(names)} sections deep.")
    path = _place(document, names)
    origin = Origin(f"--set {shortened(key)}")
    reader = _Reader(lambda _: origin)
    value = reader.value_of(text)
    if reader.dropped - {()}:
        raise UserError(f"{origin}: {DROP} takes one key away: write --set {shortened(key)}.KEY={DROP}.")
    if reader.dropped:
        document.drop(path, origin)
    else:
        document.put(path, value, Origin(f"--set {key}"))


def _place(document: Document, names: Sequence[str]) -> KeyPath:
    """The place that the names of an override lead to: one key after the other, but for those of the search space.

    Its keys are paths of settings: `search.space.optimizer.lr` is the key `optimizer.lr`, and `search.space.optimizer.lr.low` is a part
    of it where the document has that key.
    """
    inside = len(SEARCH_SPACE)
    if tuple(names[:inside]) != SEARCH_SPACE or len(names) == inside:
        return tuple(names)
    try:
        space = document.get(SEARCH_SPACE)
    except KeyError:
        space = None
    for end in range(len(names) - 1, inside, -1):
        key = ".".join(names[inside:end])
        if isinstance(space, dict) and isinstance(space.get(key), dict):
            return (*SEARCH_SPACE, key, *names[end:])
    return (*SEARCH_SPACE, ".".join(names[inside:]))


def shortened(value: object) -> str:
    """A value as an error shows it: its beginning, where it is long."""
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _read_with_parents(path: Path, below: tuple[Path, ...], files: Iterator[int]) -> Document:
    path = path.resolve()
    if path in below:
        raise UserError(
            f"{path.name}: `extends` goes in a circle: {' -> '.join(p.name for p in (*below, path))}."
        )
    if next(files) > MAX_FILES:
        raise UserError(f"{_shown(path)}: `extends` takes in more than {MAX_FILES} files; write fewer.")
    own = _read_one(path)
    parents = own.data.pop("extends", [])
    document = Document({})
    for parent in parents if isinstance(parents, list) else [parents]:
        if not isinstance(parent, str):
            raise UserError(f"{own.origin(('extends',))}: `extends` takes names of sweep files.")
        try:
            extended = find_sweep(parent, path.parent)
        except UserError as error:
            raise UserError(f"{own.origin(('extends',))}: `extends`: {error}") from None
        document.merge(_read_with_parents(extended, (*below, path), files))
    document.merge(own)
    return document


def _read_one(path: Path) -> Document:
    try:
        with path.open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{_shown(path)} cannot be read: it is no file.")
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{_shown(path)} is no sweep file: it has more than {MAX_BYTES:,} bytes.")
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"{_shown(path)} cannot be read: {reason}.") from None
    reader = _Reader(lambda line: Origin(_shown(path), line))
    data = reader.value_of(text)
    if not isinstance(data, dict):
        raise UserError(f"{_shown(path)} holds no settings: a sweep file is a mapping of sections.")
    return Document(data, reader.origins, reader.dropped, reader.replacing)


class _Reader:
    """Reads YAML text into dicts, lists and scalars, and notes where each value was written, which keys are dropped and which sections
    replace others.

    An alias stands for a copy of what it names. The number of values is bounded, because nested aliases double it with each line.
    """

    def __init__(self, origin_at: Callable[[int], Origin]) -> None:
        self.origins: dict[KeyPath, Origin] = {}
        self.dropped: set[KeyPath] = set()
        self.replacing: set[KeyPath] = set()
        self._origin_at = origin_at
        self._loader = _Loader("")
        self._values = 0

    def value_of(self, text: str) -> Any:
        """The value of a text; None where it is empty. Raises UserError, with the line, where it cannot be read."""
        try:
            if _brackets(text) > MAX_BRACKETS:
                raise RecursionError
            node = yaml.compose(text, _Loader)
            return None if node is None else self._value(node, ())
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
            problem = getattr(error, "problem", None) or "not valid YAML"
            line = mark.line if mark else 0
        except RecursionError:
            line, problem = 0, "the values are nested too deeply"
        raise UserError(
            f"{self._origin_at(line + 1)}: {problem}; a text with special characters needs quotes."
        )

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            self._refuse(node, f"there are more than {MAX_VALUES:,} values, with aliases written out")
        if len(path) > MAX_DEPTH:
            self._refuse(node, f"values are nested more than {MAX_DEPTH} deep")
        if path:
            self.origins[path] = self._origin_at(node.start_mark.line + 1)
        if node.tag == DROP:
            self._drop(node, path)
            return None
        if node.tag == REPLACE:
            if not isinstance(node, yaml.MappingNode):
                self._refuse(
                    node,
                    f"{REPLACE} stands before a section; anything else replaces what it is laid over by itself",
                )
            self.replacing.add(path)
            return self._section(node, path)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            self._refuse(node, f"the tag {shortened(node.tag)} is not known")
        if isinstance(node, yaml.MappingNode):
            return self._section(node, path)
        return [self._value(item, (*path, place)) for place, item in enumerate(node.value)]

    def _section(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        section: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, "a key is a name")
            key = str(self._scalar(key_node))
            if key in section:
                self._refuse(key_node, f"`{shortened(key)}` is given twice; keep one")
            place = (*path, key)
            value = self._value(value_node, place)
            if place not in self.dropped:
                section[key] = value
            self.origins[place] = self._origin_at(key_node.start_mark.line + 1)
        return section

    def _drop(self, node: yaml.Node, path: KeyPath) -> None:
        if not isinstance(node, yaml.ScalarNode) or node.value:
            self._refuse(node, f"{DROP} takes a key away and has no value")
        if any(isinstance(part, int) for part in path):
            self._refuse(node, f"{DROP} takes a key away; a list is replaced as a whole")
        self.dropped.add(path)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            value = self._loader.construct_object(node)
            # -0.0 is 0: as another number it would make another digest and another trial.
            return 0.0 if isinstance(value, float) and value == 0 else value
        except yaml.YAMLError:
            raise
        except (ValueError, TypeError, LookupError) as error:
            # Dates that do not exist, numbers of thousands of digits, text that is not base64.
            self._refuse(node, f"`{shortened(node.value)}` cannot be read ({summarize(error)[:SHOWN]})")

    def _refuse(self, node: yaml.Node, problem: str) -> NoReturn:
        raise UserError(f"{self._origin_at(node.start_mark.line + 1)}: {problem}.")


def _brackets(text: str) -> int:
    """How many brackets are open at once; those inside quotes count too, for no honest text has so many."""
    steps = ({"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0) for character in text)
    return max(itertools.accumulate(steps), default=0)


def _same_part(path: KeyPath, over: dict[str, Any], under: dict[str, Any]) -> bool:
    """Whether two sections can be merged: another method, network or distribution of times shares no keys with the one below."""
    usual = None
    if path == ("network",):
        usual = "dit"
    elif path[:2] in (("objective", "time"), ("objective", "times")):
        usual = "logit_normal"
    if usual and over.get("kind", usual) != under.get("kind", usual):
        return "kind" not in over
    return over.get("method", under.get("method")) == under.get("method", over.get("method"))


def _shown(path: Path) -> str:
    """A path as the user would type it: relative to the working folder where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
