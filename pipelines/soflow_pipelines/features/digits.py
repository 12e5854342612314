"""Classifier of the real digits: features for 8 x 8 images that need no downloaded weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from soflow_core.optimizer import uncompiled
from soflow_core.weights import WeightsError, require_finite
from soflow_pipelines.features.network import DISTANCES, FeatureError, Features, full_float32
from soflow_pipelines.images.convert import to_unit_range
from soflow_pipelines.sources.digits import load_digits
from soflow_pipelines.sources.source import LabelledImages
from soflow_pipelines.storage.files import write_bytes

DIGITS_VERSION = "digits-cnn-1"
HELD_OUT_EVERY = 5
EPOCHS = 12
LAYOUT_LAYERS = 7
"""Layers of the trunk before the layout is given up."""


class DigitsClassifier(nn.Module):
    """A small convolutional classifier of 8 x 8 digits; its features are the layer before the logits."""

    dim = 64
    metrics = DISTANCES | {"is", "label_agreement"}
    warnings: tuple[str, ...] = ()
    space: Literal["images", "training"] = "images"

    def __init__(self) -> None:
        super().__init__()
        self.id = DIGITS_VERSION
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 16, self.dim),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.dim, 10)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        if images.shape[1:] != (1, 8, 8):
            raise ValueError(f"the digits classifier takes (B, 1, 8, 8), not {tuple(images.shape)}")
        device = self.head.weight.device
        with full_float32(device):
            features = self.trunk(to_unit_range(images.to(device)))
            return Features(features, self.head(features))

    @torch.no_grad()
    def patch_features(self, images: Tensor) -> Tensor:
        """uint8 (B, 1, 8, 8) -> (B, 64, 4, 4): the last layer that keeps the layout."""
        device = self.head.weight.device
        with full_float32(device):
            return self.trunk[:LAYOUT_LAYERS](to_unit_range(images.to(device)))


def held_out(data: LabelledImages) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8) and labels (N,) that the digits classifier was not trained on: every fifth."""
    return torch.from_numpy(data.images[::HELD_OUT_EVERY]), torch.from_numpy(data.labels[::HELD_OUT_EVERY])


def digits_classifier(cache_dir: Path) -> DigitsClassifier:
    """The classifier of the real digits: from the cache, or trained now (seconds) and written there.

    The file is complete or absent, so processes may ask for it at the same time. The id ends in a digest
    of the weights, for another machine's rounding may train slightly different ones. Raises FeatureError where the
    file was damaged.
    """
    path = Path(cache_dir) / f"{DIGITS_VERSION}.safetensors"
    if not path.exists():
        write_bytes(path, save(train_digits_classifier(seed=0).state_dict()))
    weights = path.read_bytes()
    with torch.random.fork_rng(devices=[]):
        network = DigitsClassifier()
    try:
        tensors = load(weights)
        require_finite(tensors, path)
        network.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, WeightsError):
        raise FeatureError(f"{path} is damaged: delete it, and the classifier is trained anew.") from None
    network.id = f"{DIGITS_VERSION}-{hashlib.sha256(weights).hexdigest()[:8]}"
    return network.eval().requires_grad_(False)


def train_digits_classifier(seed: int) -> DigitsClassifier:
    """Train on four fifths of the digits, on one thread, leaving torch's global generator as it was."""
    data = load_digits()
    kept = torch.arange(len(data.labels)) % HELD_OUT_EVERY != 0
    images = torch.from_numpy(data.images)[kept]
    labels = torch.from_numpy(data.labels)[kept]
    with _one_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = DigitsClassifier()
        optimizer = uncompiled(torch.optim.AdamW)(network.parameters(), lr=2e-3, weight_decay=1e-2)
        steps = EPOCHS * -(-len(labels) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(labels)).split(64):
                optimizer.zero_grad(set_to_none=True)
                functional.cross_entropy(_logits(network, images[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
    return network


def _logits(network: DigitsClassifier, images: Tensor) -> Tensor:
    return network.head(network.trunk(to_unit_range(images)))


@contextmanager
def _one_thread() -> Iterator[None]:
    # The order of a reduction, and with it the last bits of the weights, depends on the number of threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
