"""Published weight files: finds or fetches them, and reads them as tensors."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from soflow_core.weights import WeightsError, read_torch_file, require_finite
from soflow_pipelines.features.network import FeatureError, reason
from soflow_pipelines.storage.files import sha256

REACH_SECONDS = 5.0
"""Timeout after which a server counts as out of reach."""


@dataclass(frozen=True)
class WeightFile:
    """A weight file that is published."""

    network: str
    """The network's name, as `open_features` takes it."""
    names: tuple[str, ...]
    """File names that are looked for; a fetched file gets the first."""
    url: str
    sha256: str

    @property
    def variable(self) -> str:
        """The environment variable that names a file to use instead."""
        return f"SOFLOW_{self.network.upper()}_WEIGHTS"


@dataclass(frozen=True)
class FoundWeights:
    """A weight file on this machine."""

    path: Path
    sha256: str
    published: bool
    """It is the published file, byte for byte."""

    @property
    def warnings(self) -> tuple[str, ...]:
        if self.published:
            return ()
        return (
            f"The weights {self.path.name} (SHA-256 {self.sha256[:8]}...) are not the published ones: numbers taken with them "
            "compare with no others.",
        )


def find_weights(file: WeightFile, cache: Path, download: bool) -> FoundWeights:
    """The file its variable names, or the published one in `cache` or torch hub's cache, or fetched. Raises FeatureError where there is
    none.
    """
    named = os.environ.get(file.variable)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise FeatureError(f"{file.variable}={named}: there is no such file.")
        return _examined(path, file)
    kept = Path(torch.hub.get_dir()) / "checkpoints"
    for folder in (cache, kept):
        for name in file.names:
            if (folder / name).is_file():
                return _examined(folder / name, file)
    failure = _fetch(file, cache / file.names[0]) if download else "nothing is fetched"
    if failure:
        raise FeatureError(
            f"{file.network} needs the weights {file.names[0]}, which are neither in {cache} nor in {kept}, and {failure}: "
            f"put the file from {file.url} into {cache}, or set {file.variable} to where it is."
        )
    return _examined(cache / file.names[0], file)


def _fetch(file: WeightFile, path: Path) -> str | None:
    """Fetch the file, checked against its published digest. Returns why it could not be fetched, None where it was."""
    try:
        with urlopen(Request(file.url, method="HEAD"), timeout=REACH_SECONDS):
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            file.url, str(path), hash_prefix=file.sha256, progress=sys.stderr.isatty()
        )
    except (OSError, HTTPException, RuntimeError) as error:
        return f"they cannot be fetched ({reason(error)})"
    return None


def _examined(path: Path, file: WeightFile) -> FoundWeights:
    digest = sha256(path)
    return FoundWeights(path, digest, digest == file.sha256)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors from safetensors, or from torch's format with nothing but tensors unpickled.

    Raises FeatureError for other files, and where a weight is not finite.
    """
    try:
        content = load_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
    except (OSError, SafetensorError, WeightsError) as error:
        raise FeatureError(f"{path} cannot be read as a file of named tensors: {reason(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise FeatureError(f"{path} is no dictionary of named tensors.")
    try:
        require_finite(content, path)
    except WeightsError as error:
        raise FeatureError(f"{error}.") from None
    return content
