"""Sections of a sweep file that a registered part describes: pydantic finds the part by its name when a file is read.

Parts that are registered later, by a plugin, are read like those that come with the platform.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, GetCoreSchemaHandler, TypeAdapter, create_model
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from soflow_core.networks import Architecture
from soflow_core.registration import Registry
from soflow_core.settings import SECTIONS
from soflow_platform.config.sections import NetworkSection


@dataclasses.dataclass(frozen=True)
class PartOf:
    """Annotation of a section that holds the settings of a part: `Annotated[Any, PartOf(OBJECTIVES)]`."""

    registry: Registry[Any]
    section: Callable[[type], Any] = lambda part: part
    """The type of the section for a part; by default the part's own class."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def known(self, values: Mapping[str, Any]) -> Any | None:
        """The type of the section that these values name; None where they name no registered part."""
        part = self.registry.class_for(values)
        return None if part is None else self.section(part)

    def read(self, values: Any) -> Any:
        """The part or section of plain settings. Raises pydantic's errors."""
        field = self.registry.field
        if isinstance(values, self.registry.base | NetworkSection):
            return values
        if not isinstance(values, dict):
            raise PydanticKnownError("model_attributes_type")
        kind = self.known(values)
        if kind is not None:
            return _adapter(kind).validate_python(self.registry.settings_in(values))
        if self.registry.name_in(values) is None:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": field})
        expected = ", ".join(self.registry)
        tag = str(values[field])
        raise PydanticKnownError(
            "union_tag_invalid", {"discriminator": field, "tag": tag, "expected_tags": expected}
        )


def part_of(annotation: Any) -> PartOf | None:
    """The registry whose parts an annotation takes, or None."""
    if isinstance(annotation, type) and annotation in SECTIONS:
        return PartOf(SECTIONS[annotation])
    marks = get_args(annotation)[1:] if get_origin(annotation) is not None else ()
    return next((mark for mark in marks if isinstance(mark, PartOf)), None)


Registry.read_section = staticmethod(lambda registry, values: PartOf(registry).read(values))


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@functools.cache
def network_section(architecture: type[Architecture]) -> type[BaseModel]:
    """The section `network` for an architecture: its settings without those that come from the data and the method."""
    for own in NetworkSection.__subclasses__():
        if own.__dict__.get("architecture_class") is architecture:
            return own
    hints = get_type_hints(architecture)
    given = {each.name for each in dataclasses.fields(Architecture)}
    fields = {each.name: (hints[each.name], _default(each)) for each in dataclasses.fields(architecture)}
    settings: dict[str, Any] = {name: field for name, field in fields.items() if name not in given}
    section: type[NetworkSection] = create_model(
        f"{architecture.__name__}Section", __base__=NetworkSection, __doc__=architecture.__doc__, **settings
    )
    section.architecture_class = architecture
    return section


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default for pydantic; `...` where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ... if field.default is dataclasses.MISSING else field.default
