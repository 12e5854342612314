"""Types and ranges of what a shard set says about itself: the fields of `dataset.json` and the names and digests of shards.

A set may come from anybody. Everything in it is checked here before anything is allocated, opened or named by it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_CLASSES = 1_000_000
MAX_SIDE = 2**16
MAX_SAMPLE_BYTES = 2**31 - 2**12
"""The index counts a sample's bytes in 32 bits."""
MAX_COUNT = 2**62
MAX_SHARDS = 2**20

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


def is_sha256(value: object) -> bool:
    """Whether a value is 64 hexadecimal digits, and therefore safe as a part of a file name."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def is_digest(value: object) -> bool:
    """Whether a value is `sha256:` and 64 hexadecimal digits."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def is_shard_name(value: object) -> bool:
    """Whether a value is the plain name of a file: letters, digits, `.`, `_` and `-`, no path and not hidden."""
    return isinstance(value, str) and _SHARD_NAME.fullmatch(value) is not None


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in a text. Raises ValueError, also where it is nested too deeply."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def check_description(content: Mapping[str, Any]) -> None:
    """Checks type and range of every field of `dataset.json`. Raises ValueError that names the field, its value and what it must be."""
    for name, (allowed, is_allowed) in _FIELDS.items():
        if name in content and not is_allowed(content[name]):
            raise ValueError(f"{name} is {_shortened(content[name])}, it must be {allowed}")


def _shortened(value: object) -> str:
    plain = isinstance(value, str | int | float | None)
    if isinstance(value, list) and len(value) <= 8:
        plain = all(isinstance(each, str | int | float | None) for each in value)
    shown = repr(value) if plain else f"a {type(value).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(_is_whole(side, 1, MAX_SIDE) for side in value)
    )


def _optional(is_allowed: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or is_allowed(value)


def _between(least: int, most: int) -> Callable[[object], bool]:
    return lambda value: _is_whole(value, least, most)


_FIELDS: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "kind": ("pixels or latents", lambda value: value in ("pixels", "latents")),
    "shape": (f"three whole numbers from 1 to {MAX_SIDE}", _is_shape),
    "dtype": ("uint8, float16 or float32", lambda value: value in ("uint8", "float16", "float32")),
    "classes": (f"null or a whole number from 1 to {MAX_CLASSES}", _optional(_between(1, MAX_CLASSES))),
    "class_names": ("a list of texts", _is_list_of_text),
    "resolution": (f"null or a whole number from 1 to {MAX_SIDE}", _optional(_between(1, MAX_SIDE))),
    "crop": ("null or a text", _optional(_is_text)),
    "flips": ("true or false", lambda value: isinstance(value, bool)),
    "autoencoder": ("null or a text", _optional(_is_text)),
    "autoencoder_digest": ("null or a text", _optional(_is_text)),
    "scaling": ("a number other than 0", lambda value: _is_finite(value) and value != 0),
    "shift": ("a finite number", _is_finite),
    "left_out": ("a list of texts", _is_list_of_text),
    "recipe": ("an object", lambda value: isinstance(value, Mapping)),
    "writer_version": ("a whole number", _between(0, MAX_COUNT)),
    "samples": ("a whole number of 0 or more", _between(0, MAX_COUNT)),
    "shards": (f"a whole number from 0 to {MAX_SHARDS}", _between(0, MAX_SHARDS)),
    "bytes": ("a whole number of 0 or more", _between(0, MAX_COUNT)),
    "digest": ("a text", _is_text),
}
"""What each field must be, in words and as a function."""
