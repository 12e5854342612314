"""The Inception network of FID, sFID and the Inception Score."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from soflow_pipelines.features.network import DISTANCES, FeatureError, Features, as_rgb, full_float32, reason
from soflow_pipelines.features.weight_files import FoundWeights, WeightFile, find_weights, read_tensors

WEIGHTS = WeightFile(
    network="inception",
    names=("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
VERSION = "inception-1"
SPATIAL_CHANNELS = 7
CHUNK = 64
"""Images in the network at a time."""


class InceptionFeatures:
    """The port in torch-fidelity of the graph of 2015-12-05, which resizes as TensorFlow 1 does.

    Features are the 2,048 of `pool_3`. Logits are the 1,008 without their bias, as the evaluator of ADM (Dhariwal and Nichol, 2021)
    and torch-fidelity take them for the Inception Score; their classes are not in ImageNet's order. `spatial` is the evaluator's
    (B, 17 * 17 * 7) for sFID: the first 7 channels of `mixed_6/conv`, position by position.
    """

    dim = 2048
    metrics = DISTANCES | {"fid", "sfid", "is"}
    space: Literal["images", "training"] = "images"

    def __init__(self, weights: FoundWeights, device: torch.device) -> None:
        self.id = f"{VERSION}-{weights.sha256[:8]}"
        self.warnings = weights.warnings
        self._device = device
        self._network = _network(weights.path).to(device)
        self._spatial: list[Tensor] = []
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG002
        self._spatial.append(output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """uint8 (B, 1 or 3, H, W) -> (B, 2048), (B, 1008) and (B, 2023), float32."""
        rgb = as_rgb(images, "inception")
        self._spatial.clear()
        with full_float32(self._device):
            parts = [self._network(part.to(self._device)) for part in rgb.split(CHUNK)]
        features, logits = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        spatial = torch.cat(self._spatial)
        self._spatial.clear()
        return Features(features, logits, spatial)


def open_inception(cache: Path, device: torch.device, download: bool) -> InceptionFeatures:
    """Open Inception. Raises FeatureError where its weights cannot be had."""
    return InceptionFeatures(find_weights(WEIGHTS, cache, download), device)


def _network(path: Path) -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # torch-fidelity unpickles whatever its file holds; what it gets from here was read as tensors.
    tensors = io.BytesIO()
    torch.save(read_tensors(path), tensors)
    tensors.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], tensors)
    except RuntimeError as error:
        raise FeatureError(
            f"{path} does not hold the weights of torch-fidelity's Inception: {reason(error)}"
        ) from error
