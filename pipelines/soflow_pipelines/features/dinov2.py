"""DINOv2 ViT-L/14 (Oquab et al., 2023), for FD-DINOv2 (Stein et al., 2023)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

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

WEIGHTS = WeightFile(
    network="dinov2",
    names=("dinov2_vitl14_pretrain.pth",),
    url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
)
VERSION = "dinov2-1"
SIDE = 224
HEAD = 64
"""Width of an attention head, in all sizes of DINOv2."""
OFFSET = 0.1
"""Patches added to the grid's side when positions are interpolated, as DINOv2's own code does."""
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CHUNK = 64


class DinoFeatures:
    """The class token after the last norm, of images resized to 224 x 224 as torch-fidelity does it.

    torch-fidelity opens DINOv2 by running code that it fetches; this is the same network from timm with the same file.
    """

    metrics = DISTANCES
    space: Literal["images", "training"] = "images"

    def __init__(self, weights: FoundWeights, device: torch.device) -> None:
        self.id = f"{VERSION}-{weights.sha256[:8]}"
        self.warnings = weights.warnings
        self._device = device
        try:
            self._network = vision_transformer(read_tensors(weights.path)).to(device)
        except (KeyError, RuntimeError) as error:
            raise FeatureError(
                f"{weights.path} does not hold the weights of a DINOv2 ViT: {reason(error)}"
            ) from error
        self.dim = int(self._network.num_features)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """uint8 (B, 1 or 3, H, W) -> (B, D) float32; D is 1,024 for ViT-L."""
        rgb = as_rgb(images, "dinov2")
        with full_float32(self._device):
            parts = [
                self._network(normalized(part.to(self._device), SIDE, MEAN, STD)) for part in rgb.split(CHUNK)
            ]
        return Features(torch.cat(parts))

    @torch.no_grad()
    def patch_features(self, images: Tensor) -> Tensor:
        """uint8 (B, 1 or 3, H, W) -> (B, D, 16, 16) float32: the tokens of the patches after the last norm."""
        rgb = as_rgb(images, "dinov2")
        with full_float32(self._device):
            parts = [
                self._network.forward_features(normalized(part.to(self._device), SIDE, MEAN, STD))[:, 1:]
                for part in rgb.split(CHUNK)
            ]
        tokens = torch.cat(parts).transpose(1, 2)
        return tokens.unflatten(2, (math.isqrt(tokens.shape[2]),) * 2)


def open_dinov2(cache: Path, device: torch.device, download: bool) -> DinoFeatures:
    """Open DINOv2. Raises FeatureError where its weights cannot be had."""
    return DinoFeatures(find_weights(WEIGHTS, cache, download), device)


def vision_transformer(tensors: dict[str, Tensor]) -> Any:
    """timm's network with weights in DINOv2's names, positions interpolated to 224 x 224. Raises KeyError
    or RuntimeError for others.
    """
    from timm.models.vision_transformer import VisionTransformer

    width, patch = tensors["cls_token"].shape[-1], tensors["patch_embed.proj.weight"].shape[-1]
    kept = {name: tensor.float() for name, tensor in tensors.items() if name != "mask_token"}
    kept["pos_embed"] = resampled_positions(kept["pos_embed"], SIDE // patch)
    network = VisionTransformer(
        img_size=SIDE,
        patch_size=patch,
        embed_dim=width,
        depth=1 + max(int(name.split(".")[1]) for name in kept if name.startswith("blocks.")),
        num_heads=width // HEAD,
        mlp_ratio=kept["blocks.0.mlp.fc1.weight"].shape[0] / width,
        init_values=1.0,
        num_classes=0,
        global_pool="token",
    )
    network.load_state_dict(kept)
    return network.eval().requires_grad_(False)


def resampled_positions(positions: Tensor, side: int) -> Tensor:
    """(1, 1 + n², D) -> (1, 1 + side², D), bicubic, as DINOv2's own code does for inputs of another size than its training's."""
    side_before = math.isqrt(positions.shape[1] - 1)
    if side_before == side:
        return positions
    grid = positions[:, 1:].unflatten(1, (side_before, side_before)).permute(0, 3, 1, 2)
    scale = (side + OFFSET) / side_before
    resampled = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1], resampled.flatten(2).transpose(1, 2)], dim=1)
