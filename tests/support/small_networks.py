"""Small networks in the formats that people bring: an exported feature network, and an autoencoder with latents of real files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from soflow_pipelines.images.autoencoder import KlKind, load_autoencoder
from soflow_pipelines.preparation.build import prepare_locally
from soflow_pipelines.preparation.shard_plan import PrepareSettings, ShardPlan
from soflow_pipelines.sources.opening import open_source
from soflow_pipelines.storage.opening import open_storage


class Thumbnail(nn.Module):
    """An image as a few averages."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(side)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(images).flatten(1)


def exported(folder: Path, channels: int, size: int, side: int = 2) -> str:
    """`file:PATH` of a network for such images."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "name": "thumbnail",
        "size": [size, size],
        "range": [-1, 1],
        "channels": channels,
        "resize": "none",
    }
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        Thumbnail(side), (torch.zeros(2, channels, size, size),), dynamic_shapes=({0: batch},)
    )
    torch.export.save(program, folder / "net.pt2")
    (folder / "net.json").write_text(json.dumps(described))
    return f"file:{folder / 'net.pt2'}"


def latent_set(root: Path) -> tuple[Path, Path, Path]:
    """A small autoencoder in diffusers' format, a shard set of latents made with it, and the 40 images they are of, 16 x 16."""
    torch.manual_seed(0)
    KlKind.example(root / "autoencoder")
    pixels = np.random.default_rng(0)
    for number in range(40):
        path = root / "images" / f"class{number % 4}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(path)
    autoencoder = load_autoencoder(str(root / "autoencoder"))
    plan = ShardPlan(open_source(str(root / "images")), PrepareSettings(resolution=16), autoencoder.facts)
    prepare_locally(plan, open_storage(root / "set"), autoencoder)
    return root / "autoencoder", root / "set", root / "images"
