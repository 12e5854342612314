"""Paths and URIs of a sweep file, made absolute so that processes with other working folders find the same place."""

from __future__ import annotations

from pathlib import Path

FILE = "file:"


def absolute_features(name: str) -> str:
    """`file:PATH` as processes with other working folders find it; other names as they are."""
    if not name.startswith(FILE):
        return name
    return FILE + str(Path(name.removeprefix(FILE)).expanduser().absolute())


def absolute_autoencoder(name: str | None) -> str | None:
    """The folder of an autoencoder as processes with other working folders find it; an id as it is."""
    folder = Path(name or "").expanduser()
    return str(folder.absolute()) if name and folder.is_dir() else name


def absolute_place(place: str) -> str:
    """A folder as processes with other working folders find it, or `s3://bucket/prefix`. Raises ValueError for other schemes."""
    scheme, separator, rest = place.partition("://")
    if not separator or scheme == "file":
        return str(Path(rest if separator else place).expanduser().absolute())
    if scheme != "s3":
        raise ValueError(f"{scheme}:// cannot be written: give a folder or s3://bucket/prefix")
    if not rest.partition("?")[0].partition("/")[0]:
        raise ValueError(f"{place} names no bucket: give s3://bucket/prefix")
    return place


def absolute_tracking(uri: str) -> str:
    """A tracking URI with the path of an SQLite file made absolute. Raises ValueError for a folder, which MLflow does not take."""
    if uri.startswith("sqlite:"):
        path = uri.removeprefix("sqlite:///")
        if path in ("", uri):
            raise ValueError(f"{uri} names no file: give sqlite:///FILE")
        return f"sqlite:///{Path(path).expanduser().absolute()}"
    if uri.startswith("file:") or ("://" not in uri and uri != "databricks"):
        raise ValueError(f"{uri} is no tracking server: give http://HOST:PORT or sqlite:///FILE")
    return uri
