"""Paths and URIs of a sweep file, made absolute so that processes with other working folders find the same place."""

from __future__ import annotations

import os
import re
from pathlib import Path

from soflow_core.registration import NAME

FILE = "file:"


def absolute_features(name: str) -> str:
    """`file:PATH` as processes with other working folders find it; other names as they are."""
    if not name.startswith(FILE):
        return name
    return FILE + str(Path(name.removeprefix(FILE)).expanduser().absolute())


def absolute_autoencoder(name: str | None) -> str | None:
    """The folder of an autoencoder, also behind `KIND:`, as processes with other working folders find it; an id as it is."""
    folder = Path(name or "").expanduser()
    if name and folder.is_dir():
        return str(folder.absolute())
    kind, colon, place = (name or "").partition(":")
    found = Path(place).expanduser()
    if place and NAME.fullmatch(kind) and not place.startswith("//") and found.exists():
        return f"{kind}{colon}{found.absolute()}"
    return name


def absolute_place(place: str) -> str:
    """A folder as processes with other working folders find it, or `s3://bucket/prefix`. Raises ValueError for other schemes."""
    scheme, separator, rest = place.partition("://")
    if not separator or scheme == "file":
        folder = Path(rest if separator else place).expanduser().absolute()
        there = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
        if not there.is_dir():
            raise ValueError(f"{there} is a file: give a folder")
        return str(folder)
    if scheme != "s3":
        raise ValueError(f"{scheme}:// cannot be written: give a folder or s3://bucket/prefix")
    if not rest.partition("?")[0].partition("/")[0]:
        raise ValueError(f"{place} names no bucket: give s3://bucket/prefix")
    if "@" in rest.partition("/")[0] or has_secret(place):
        raise ValueError(
            "an s3:// URI holds no keys, for it is shown and stored: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return place


WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def is_file_name(name: str) -> bool:
    """Whether the name of weights is that of a file or folder, and not of a registered model, a sweep or a trial."""
    if name.startswith("models:/") or "://" in name:
        return False
    return name.startswith((".", "/", "~")) or Path(name).suffix in WEIGHT_SUFFIXES


def absolute_weights(name: str) -> str:
    """A file or folder of weights as processes with other working folders find it; other names as they are."""
    return str(Path(name).expanduser().absolute()) if is_file_name(name) else name


SECRET = re.compile(r"pass|pwd|secret|token|key|sig|auth|cred", re.IGNORECASE)
"""In names of a URI's query parameters whose values are secret."""


def has_secret(uri: str) -> bool:
    """Whether a URI holds a password, a token or a key: before the host, or in its query."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return False
    before, at, _ = rest.partition("?")[0].partition("/")[0].rpartition("@")
    # The name of a database's user is no secret; a web address with a name alone holds a token.
    if at and (":" in before or scheme.lower() in ("http", "https")):
        return True
    # A password with signs that should have been escaped ends neither at a slash nor at a question mark.
    if ":" in rest.partition("@")[0] and "@" in rest:
        return True
    return any(SECRET.search(part.partition("=")[0]) for part in re.split("[?&;]", rest)[1:])


def require_no_secret(uri: str) -> None:
    """Raises ValueError where a tracking URI holds a secret; the text does not repeat it."""
    if has_secret(uri):
        raise ValueError(
            "the tracking URI holds a password or a token, and URIs are shown and stored: leave it out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) for a server, PGPASSWORD or "
            "~/.pgpass for PostgreSQL"
        )


def absolute_tracking(uri: str) -> str:
    """A tracking URI with the path of an SQLite file made absolute. Raises ValueError for a folder, which MLflow does not take,
    and for one that holds a secret.
    """
    require_no_secret(uri)
    if uri.startswith("sqlite:"):
        path = uri.removeprefix("sqlite:///")
        if path in ("", uri):
            raise ValueError(f"{uri} names no file: give sqlite:///FILE")
        return f"sqlite:///{Path(path).expanduser().absolute()}"
    if uri.startswith("file:") or ("://" not in uri and uri != "databricks"):
        raise ValueError(f"{uri} is no tracking server: give http://HOST:PORT or sqlite:///FILE")
    return uri
