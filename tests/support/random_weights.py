"""Weight files in the published formats with random weights, for the published ones cannot be shipped; and one that bites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def save_inception(path: Path, seed: int = 0) -> Path:
    """The file that torch-fidelity's Inception loads."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """There is nothing to load yet."""

    torch.save({}, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Untrained("untrained", ["2048"], path)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.normal_(network.fc.weight, std=0.2)
    torch.save(network.state_dict(), path)
    return path


def dinov2_tensors(seed: int = 0, width: int = 64, depth: int = 2, patch: int = 14) -> dict[str, Tensor]:
    """Tensors in the names and shapes of DINOv2's file, of a small ViT trained at 518 x 518."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.1) -> Tensor:
        return torch.randn(*shape, generator=draw) * std

    tensors = {
        "cls_token": normal(1, 1, width),
        "mask_token": normal(1, width),
        "pos_embed": normal(1, 1 + (518 // patch) ** 2, width),
        "patch_embed.proj.weight": normal(width, 3, patch, patch, std=0.03),
        "patch_embed.proj.bias": normal(width),
        "norm.weight": 1 + normal(width),
        "norm.bias": normal(width),
    }
    for number in range(depth):
        block = {
            "norm1.weight": 1 + normal(width),
            "norm1.bias": normal(width),
            "attn.qkv.weight": normal(3 * width, width, std=0.2),
            "attn.qkv.bias": normal(3 * width),
            "attn.proj.weight": normal(width, width),
            "attn.proj.bias": normal(width),
            "ls1.gamma": normal(width, std=1.0),
            "norm2.weight": 1 + normal(width),
            "norm2.bias": normal(width),
            "mlp.fc1.weight": normal(4 * width, width),
            "mlp.fc1.bias": normal(4 * width),
            "mlp.fc2.weight": normal(width, 4 * width),
            "mlp.fc2.bias": normal(width),
            "ls2.gamma": normal(width, std=1.0),
        }
        tensors |= {f"blocks.{number}.{name}": tensor for name, tensor in block.items()}
    return tensors


def clip_tensors(seed: int = 0, width: int = 64, depth: int = 2) -> dict[str, Tensor]:
    """Tensors in the names of CLIP's ViT file, of a small image tower, in half precision as published."""
    from torch_fidelity.feature_extractor_clip import CLIPVisual

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = CLIPVisual(32, 224, depth, width, 32).state_dict()
        extra = {"text_projection": torch.randn(16, 32), "logit_scale": torch.ones(())}
    return {name: tensor.half() for name, tensor in (tower | extra).items()}


def save_as_program(tensors: dict[str, Tensor], path: Path) -> Path:
    """A TorchScript file that holds these tensors, which is how CLIP is published."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *folders, leaf = name.split(".")
        at = root
        for folder in folders:
            if not hasattr(at, folder):
                at.add_module(folder, nn.Module())
            at = getattr(at, folder)
        at.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    torch.jit.save(torch.jit.script(root), path)
    return path


class Bomb:
    """Unpickling it makes a file: the mark of code that ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)
