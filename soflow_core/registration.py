"""Registries of parts: `@register("name")` on a settings dataclass makes a method or a network known by that name.

A registry belongs to the base class of a kind of part. What reads or writes settings (sweep files, headers of weights, error
messages, tests) asks it, so that a part is one class in one file and its name stands once, wherever the file is.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Generic, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from soflow_core.failures import InputError
from soflow_core.settings import PARTS, SECTIONS, from_dict

PartT = TypeVar("PartT")
ClassT = TypeVar("ClassT", bound=type)

NAME = re.compile(r"[a-z][a-z0-9_-]{0,59}")
PLAIN = (int, float, bool, str, type(None))
"""Types of settings that a JSON header holds as they are."""


class RegistrationError(InputError, TypeError):
    """Raised at import for a part that cannot be registered; the text begins with its file and line."""


class UnknownPart(InputError, ValueError):
    """Raised for the name of a part that is not registered."""


class Registry(Mapping[str, type[PartT]], Generic[PartT]):
    """The parts of one kind, by name, in the order of their registration."""

    all: ClassVar[list[Registry[Any]]] = []
    """Every registry there is."""
    look_outside: ClassVar[Callable[[], None]] = staticmethod(lambda: None)
    """Called when a name is asked for that is not known: it may register more."""
    read_section: ClassVar[Callable[[Registry[Any], Mapping[str, Any]], Any]] = staticmethod(
        lambda registry, values: registry.read(values)
    )
    """How pydantic reads a section: what reads sweep files puts a reader here that names the setting that is wrong."""

    def __init__(
        self, kind: str, base: type[PartT], field: str, default: str | None = None, section: bool = False
    ) -> None:
        """`section`: parts stand as a section of other settings, and one that says no name is the default's, which has none itself.

        So a section that was of one class before there were several is written as it was.
        """
        self.kind, self.base, self.field, self.default, self.section = kind, base, field, default, section
        self.parts: dict[str, type[PartT]] = {}
        Registry.all.append(self)
        if section:
            SECTIONS[base] = self

    def __getitem__(self, name: str) -> type[PartT]:
        return self.parts[name]

    def __contains__(self, name: object) -> bool:
        if name not in self.parts and isinstance(name, str) and NAME.fullmatch(name):
            Registry.look_outside()
        return name in self.parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def name_in(self, values: Mapping[str, Any]) -> Any:
        """The part's name in plain settings; the default's where they have none, as before there were several."""
        return values.get(self.field, self.default)

    def read(self, values: Mapping[str, Any]) -> PartT:
        """The part that plain settings describe. Raises UnknownPart for its name, and ValueError for a setting."""
        name = self.name_in(values)
        if not isinstance(name, str) or name not in self:
            raise UnknownPart(f"its {self.field} is {name!r}; known are {', '.join(self)}")
        return from_dict(self[name], self.settings_in(values))

    def class_for(self, values: Mapping[str, Any]) -> type[PartT] | None:
        """The class that plain settings name; None where it is not registered."""
        name = self.name_in(values)
        return self[name] if isinstance(name, str) and name in self else None

    def settings_in(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Plain settings without a name that is no setting of its class."""
        if not self.section or self.name_in(values) != self.default:
            return values
        return {name: value for name, value in values.items() if name != self.field}

    def named(self, text: str) -> PartT:
        """The part of `NAME`, or of `NAME:VALUE` where it has one setting, a number. Raises ValueError."""
        name, colon, value = text.partition(":")
        if name not in self:
            raise UnknownPart(f"there is no {self.kind} {name!r}; known are {', '.join(self)}")
        part = self[name]
        if not colon:
            return part()
        fields = dataclasses.fields(part)  # type: ignore[arg-type]
        settings = [each.name for each in fields if each.init and each.name != self.field]
        if len(settings) != 1:
            raise ValueError(f"{name} has {len(settings)} settings")
        return part(**{settings[0]: float(value)})

    def check(self, setting: str, text: str) -> None:
        """Raises ValueError where the value of a setting names no part as `named` takes it."""
        name = text.partition(":")[0]
        if name not in self:
            raise ValueError(f"{setting} is {text!r}; it is one of {', '.join(map(repr, self))}")
        try:
            self.named(text)
        except ValueError as error:
            raise ValueError(f"{setting} is {text!r}: {error}; give {name}, or {name}:NUMBER") from None

    def add(self, name: str, part: type) -> None:
        """Registers a class. Raises RegistrationError, with its file and line, for one that breaks a rule of its kind."""
        fault = self._fault(name, part)
        if fault is not None:
            raise RegistrationError(f"{where(part)}: {part.__name__} {fault}")
        if self.section and name == self.default:
            type.__setattr__(part, self.field, name)
        else:
            _add_name_field(part, self.field, name)
        self.parts[name] = part

    def _fault(self, name: str, part: Any) -> str | None:
        """What is wrong with a part, and what to do; None where nothing is."""
        known = self.parts.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            part.__module__,
            part.__qualname__,
        ):
            return f"takes the name {name!r}, which {known.__name__} in {where(known)} has: choose another"
        if not NAME.fullmatch(name):
            return f"has the name {name!r}: take small letters, digits, `_` and `-`, a letter first"
        if "__dataclass_fields__" not in vars(part):
            return "is no dataclass: write @dataclass(frozen=True) between @register and the class"
        if not part.__dataclass_params__.frozen or "__slots__" in vars(part):
            return "can be changed or has slots: its decorator is @dataclass(frozen=True)"
        if (part.__doc__ or f"{part.__name__}(").startswith(f"{part.__name__}("):
            return "has no docstring: its first line is what help and pages show"
        if self.field in vars(part).get("__annotations__", {}):
            return f"declares `{self.field}`, which its registration gives it: leave the field out"
        if getattr(part, "__abstractmethods__", None):
            return f"lacks {', '.join(sorted(part.__abstractmethods__))}: see {self.base.__module__}"
        return _unwritable(part) or _own_fault(self.base, part)


def register(name: str) -> Callable[[ClassT], ClassT]:
    """Decorator that registers a settings dataclass under a name, in the registry of its base class.

    Raises RegistrationError, with file and line, where the class breaks a rule of its kind.
    """

    def decorate(part: ClassT) -> ClassT:
        for registry in Registry.all:
            if issubclass(part, registry.base):
                registry.add(name, part)
                return part
        bases = ", ".join(f"{r.base.__name__} ({r.kind})" for r in Registry.all)
        raise RegistrationError(
            f"{where(part)}: {part.__name__} is of no kind of part: derive it from one of {bases}"
        )

    return decorate


def part_setting(registry: Registry[Any], default: str) -> Any:
    """A field of a settings dataclass whose text names a part, as `NAME` or `NAME:VALUE`; `check_values` checks it."""
    return dataclasses.field(default=default, metadata={PARTS: registry})


class SectionPart:
    """Base of the base class of parts that stand as a section: pydantic finds the class when it reads one."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable[[Any], Any]) -> Any:
        registry = SECTIONS.get(cls)
        if registry is None:
            return handler(source)

        def read(values: Any) -> Any:
            return values if isinstance(values, registry.base) else Registry.read_section(registry, values)

        return {"type": "function-plain", "function": {"type": "no-info", "function": read}}


def parts_in(settings: Any) -> Iterator[Any]:
    """A settings dataclass, the dataclasses in its fields, and the parts that its texts name."""
    yield settings
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        if PARTS in each.metadata and value is not None:
            value = each.metadata[PARTS].named(value)
        if dataclasses.is_dataclass(value):
            yield from parts_in(value)


def where(part: type) -> str:
    """`FILE:LINE` of a class, or its module where it has no source."""
    try:
        return f"{inspect.getsourcefile(part)}:{inspect.getsourcelines(part)[1]}"
    except (OSError, TypeError):
        return getattr(sys.modules.get(part.__module__), "__file__", None) or part.__module__


def _own_fault(base: type, part: type) -> str | None:
    """What the base class finds wrong with one of its kind."""
    check: Callable[[type], str | None] | None = getattr(base, "registration_fault", None)
    return None if check is None else check(part)


def _unwritable(part: type) -> str | None:
    """The first setting that a header could not hold."""
    try:
        hints = get_type_hints(part)
    except (NameError, TypeError) as error:
        return f"has a setting whose type cannot be read ({error}): import its name in the module itself"
    for each in dataclasses.fields(part):
        if each.init and not _is_writable(hints[each.name]):
            return (
                f"has the setting `{each.name}`, which a header cannot hold: take numbers, text, true and false, tuples of them, "
                "Literal, or frozen dataclasses of these"
            )
    return None


def _is_writable(hint: Any) -> bool:
    origin, members = get_origin(hint), get_args(hint)
    if hint in PLAIN or hint in SECTIONS:
        return True
    if origin is Literal:
        return all(isinstance(member, PLAIN) for member in members)
    if origin in (Union, types.UnionType, tuple):
        return all(member is Ellipsis or _is_writable(member) for member in members)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return all(_is_writable(hints[each.name]) for each in dataclasses.fields(hint))
    return False


def _add_name_field(part: Any, field: str, name: str) -> None:
    """Makes the name a field of a frozen dataclass, as if it had been declared first: `field: Literal[name] = name`.

    The class stays the same object; what the decorator made is made again, with the settings as they were declared.
    """
    declared = dict(vars(part).get("__annotations__", {}))
    for each in declared:
        known = part.__dataclass_fields__.get(each)
        if known is not None and known in dataclasses.fields(part):
            type.__setattr__(part, each, known)
    for method in ("__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__"):
        made = vars(part).get(method)
        if made is not None and inspect.unwrap(made).__code__.co_filename == "<string>":
            type.__delattr__(part, method)
    part.__annotations__ = {field: Literal[name], **declared}
    # Only by keyword: settings without a default may follow.
    type.__setattr__(part, field, dataclasses.field(default=name, kw_only=True))
    if "__match_args__" in vars(part):
        type.__delattr__(part, "__match_args__")
    cast(Any, dataclasses.dataclass(frozen=True))(part)
