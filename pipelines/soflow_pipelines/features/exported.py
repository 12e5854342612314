"""Feature network from a torch.export program and a JSON file that describes its input."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from soflow_pipelines.features.network import DISTANCES, FeatureError, Features, as_rgb, full_float32, reason
from soflow_pipelines.storage.files import parse_json

RESIZINGS = ("bilinear", "bicubic", "none")
LOGITS = ("none", "classes", "labels")
CHUNK = 64
FORCE_TENSORS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
FORCE_PICKLES = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True)
class ProgramInput:
    """The content of the JSON file."""

    name: str
    size: tuple[int, int]
    """Height and width of the images that the program takes."""
    range: tuple[float, float]
    """Values that 0 and 255 become."""
    channels: int = 3
    resize: str = "bilinear"
    """Antialiased; `none` refuses images of another size."""
    logits: str = "none"
    """The second output: none, logits of some `classes`, or of the `labels` of the data."""
    version: str = "1"


class ExportedFeatures:
    """A program from float32 (B, C, H, W) to features (B, D), or to features and logits (B, K)."""

    space: Literal["images", "training"] = "images"
    warnings: tuple[str, ...] = ()

    def __init__(self, path: Path, device: torch.device) -> None:
        description = path.with_suffix(".json")
        self._input = _read_input(description)
        self._path, self._device = path, device
        self._program = _load_program(path, device)
        digest = hashlib.sha256(path.read_bytes() + description.read_bytes()).hexdigest()
        self.id = f"file-{self._input.name}-{self._input.version}-{digest[:8]}"
        self.metrics = DISTANCES
        if self._input.logits != "none":
            self.metrics |= {"is"} | ({"label_agreement"} if self._input.logits == "labels" else set())
        # Two sizes of batch, for a program may have been exported for one alone.
        for count in (2, 3):
            tried = self(torch.zeros(count, self._input.channels, *self._input.size, dtype=torch.uint8))
        self.dim = int(tried.features.shape[1])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """uint8 (B, 1 or 3, H, W) -> (B, D) float32, and (B, K) where the program has logits."""
        pixels = as_rgb(images, self.id) if self._input.channels == 3 else images
        with full_float32(self._device):
            parts = [self._run(self._prepared(part.to(self._device))) for part in pixels.split(CHUNK)]
        features = torch.cat([part.features for part in parts])
        if self._input.logits == "none":
            return Features(features)
        return Features(features, torch.cat([part.logits for part in parts if part.logits is not None]))

    def _prepared(self, images: Tensor) -> Tensor:
        low, high = self._input.range
        if images.shape[1] != self._input.channels:
            raise ValueError(f"{self.id} takes {self._input.channels} channels, not {tuple(images.shape)}")
        values = images.float()
        if tuple(images.shape[2:]) != self._input.size:
            if self._input.resize == "none":
                raise ValueError(
                    f"{self.id} takes images of {self._input.size}, not of {tuple(images.shape[2:])}"
                )
            values = functional.interpolate(
                values, self._input.size, mode=self._input.resize, align_corners=False, antialias=True
            )
        return values * ((high - low) / 255) + low

    def _run(self, values: Tensor) -> Features:
        try:
            output = self._program(values)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise FeatureError(
                f"{self._path} cannot take {len(values)} images of {self._input.size} on {self._device}: {reason(error)} (export "
                "it with a dynamic first dimension)"
            ) from error
        expected = 1 if self._input.logits == "none" else 2
        outputs = (output,) if isinstance(output, Tensor) else tuple(output)
        fitting = all(isinstance(part, Tensor) and part.shape[:-1] == values.shape[:1] for part in outputs)
        if len(outputs) != expected or not fitting:
            what = "features (B, D)" if expected == 1 else "features (B, D) and logits (B, K)"
            raise FeatureError(f"{self._path} does not give {what}, as its JSON file says.")
        return Features(outputs[0].float(), outputs[1].float() if expected == 2 else None)


def open_exported(path: Path, device: torch.device) -> ExportedFeatures:
    """Open a program. Raises FeatureError where it or its JSON file is missing or cannot be used."""
    return ExportedFeatures(path, device)


def _load_program(path: Path, device: torch.device) -> Any:
    from torch.export.passes import move_to_device_pass

    try:
        with _tensors_alone():
            program = torch.export.load(path)
    except Exception as error:  # the archive's reader raises whatever its parts raise
        raise FeatureError(f"{path} cannot be read as a torch.export program: {reason(error)}") from error
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    return program.module()


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """torch.export would unpickle parts of a program; torch's own switch keeps it to tensors."""
    before = {name: os.environ.pop(name, None) for name in (FORCE_TENSORS, FORCE_PICKLES)}
    os.environ[FORCE_TENSORS] = "1"
    try:
        yield
    finally:
        del os.environ[FORCE_TENSORS]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _read_input(path: Path) -> ProgramInput:
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise FeatureError(
            f'{path} is missing: beside the program it says what it takes, such as {{"name": "resnet", "size": [224, 224], '
            '"range": [0, 1]}.'
        ) from None
    except (OSError, ValueError) as error:
        raise FeatureError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(content, dict):
        raise FeatureError(f"{path} is no JSON object.")
    known = [field.name for field in fields(ProgramInput)]
    for name in content:
        if name not in known:
            raise FeatureError(f"{path}: {name!r} is not known; there are {', '.join(known)}.")
    for name in ("name", "size", "range"):
        if name not in content:
            raise FeatureError(f"{path}: {name!r} is missing.")
    return _checked_input(path, content)


def _checked_input(path: Path, content: dict[str, Any]) -> ProgramInput:
    size, ends = content["size"], content["range"]
    if not (_pair(size, int) and min(size) >= 1):
        raise FeatureError(f'{path}: "size" is [height, width], not {size}.')
    if not (_pair(ends, (int, float)) and ends[0] < ends[1]):
        raise FeatureError(f'{path}: "range" is what 0 and 255 become, such as [-1, 1], not {ends}.')
    for name in ("name", "version"):
        if not str(content.get(name, "1")).replace("-", "").replace(".", "").replace("_", "").isalnum():
            raise FeatureError(
                f'{path}: "{name}" is letters, digits, ".", "-" and "_", not {content[name]!r}.'
            )
    for name, allowed in (("channels", (1, 3)), ("resize", RESIZINGS), ("logits", LOGITS)):
        if name in content and content[name] not in allowed:
            raise FeatureError(
                f'{path}: "{name}" is one of {", ".join(map(str, allowed))}, not {content[name]!r}.'
            )
    return ProgramInput(
        **content
        | {
            "name": str(content["name"]),
            "version": str(content.get("version", "1")),
            "size": (size[0], size[1]),
            "range": (float(ends[0]), float(ends[1])),
        }
    )


def _pair(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, kind) for part in value)
