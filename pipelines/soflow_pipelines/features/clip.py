"""CLIP ViT-B/32 as a feature network (Radford et al., 2021)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from soflow_pipelines.features.network import (
    DISTANCES,
    FeatureError,
    Features,
    as_rgb,
    full_float32,
    normalized,
    reason,
)
from soflow_pipelines.features.weight_files import FoundWeights, WeightFile, find_weights, read_tensors

_SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
WEIGHTS = WeightFile(
    network="clip",
    names=("ViT-B-32.pt", f"clip-vit-b-32-{_SHA256}.pt"),
    url=f"https://openaipublic.azureedge.net/clip/models/{_SHA256}/ViT-B-32.pt",
    sha256=_SHA256,
)
VERSION = "clip-1"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CHUNK = 64


class ClipFeatures:
    """The image embedding before its normalization, of torch-fidelity's network and resizing."""

    metrics = DISTANCES
    space: Literal["images", "training"] = "images"

    def __init__(self, weights: FoundWeights, device: torch.device) -> None:
        from torch_fidelity.feature_extractor_clip import build_model

        self.id = f"{VERSION}-{weights.sha256[:8]}"
        self.warnings = weights.warnings
        self._device = device
        tensors = _tensors(weights)
        try:
            self.dim = int(tensors["text_projection"].shape[1])
            self._network: Any = build_model(tensors, torch.float32).visual.to(device)
        except (KeyError, RuntimeError, ValueError) as error:
            raise FeatureError(
                f"{weights.path} does not hold the weights of CLIP: {reason(error)}"
            ) from error
        self._side = int(self._network.input_resolution)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """uint8 (B, 1 or 3, H, W) -> (B, D) float32; D is 512 for ViT-B/32."""
        rgb = as_rgb(images, "clip")
        with full_float32(self._device):
            parts = [
                self._network(normalized(part.to(self._device), self._side, MEAN, STD))
                for part in rgb.split(CHUNK)
            ]
        return Features(torch.cat(parts))


def open_clip(cache: Path, device: torch.device, download: bool) -> ClipFeatures:
    """Open CLIP. Raises FeatureError where its weights cannot be had."""
    return ClipFeatures(find_weights(WEIGHTS, cache, download), device)


def _tensors(weights: FoundWeights) -> dict[str, Tensor]:
    if not weights.published:
        return read_tensors(weights.path)
    # The published file is a TorchScript program; only that very program is opened as one.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return dict(torch.jit.load(weights.path, map_location="cpu").state_dict())
