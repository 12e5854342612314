"""URIs as they can be shown and kept: without passwords, tokens and the like."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

from soflow_core.failures import printable
from soflow_pipelines.storage.object_store import LocationError

_USER = re.compile(r"(?<=://)[^/?#\s]*@")
_QUERY = re.compile(r"[?#].*", re.DOTALL)


def without_secrets(uri: str) -> str:
    """A URI with the user, password, query and fragment that it has replaced by `***`, escaped for showing."""
    shown = _USER.sub("***@", _QUERY.sub("?***", uri)) if "://" in uri else uri
    return printable(shown)


def parse_uri(uri: str) -> SplitResult:
    """The parts of a URI. Raises LocationError where it is none, which shows no secrets."""
    try:
        parts = urlsplit(uri)
        # Both are parsed only when they are asked for.
        _ = parts.port, parts.hostname
    except ValueError as error:
        raise LocationError(f"{without_secrets(uri)} is not a URI: {_safe(error, uri)}.") from None
    if not uri.isprintable() or " " in uri:
        raise LocationError(f"{without_secrets(uri)} is not a URI: write what is not plain text as %XX.")
    return parts


def _safe(error: ValueError, uri: str) -> str:
    """Why a URI cannot be parsed; only that it cannot where the reason may quote a secret."""
    return printable(error) if "@" not in uri and "?" not in uri else "its host or port cannot be understood"
