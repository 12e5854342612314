"""U-Net of two times for pixels: the DDPM++ network of EDM (SongUNet, arXiv 2206.00364) as SoFlow trains it on CIFAR-10.

Positional embeddings of t and t - s stand beside each other where EDM has that of its noise level. Parameters have EDM's names, so
that the official checkpoints' tensors fit without their prefix (`soflow_core.published`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu

from soflow_core.labels import NULL_LABEL
from soflow_core.networks.base import Architecture, NetworkModule
from soflow_core.networks.unet_layers import Positional, Resample, UNetBlock, group_norm, groups_of
from soflow_core.registration import register

EMBEDDING = 4
"""Width of the embedding of the conditions, over `base`."""
LARGEST = {"base": 2**12, "blocks": 2**6, "time_width": 2**14}
MOST_LEVELS, MOST_TAPS, MOST_AUGMENTATIONS = 10, 16, 64


@dataclass(frozen=True)
class Layer:
    """One convolution or block of a U-Net, as sizes: what decides its parameters and FLOPs."""

    name: str
    inputs: int
    outputs: int
    side: tuple[int, int]
    """Height and width of the output."""
    direction: str | None = None
    attention: bool = False
    joins: bool = False
    """Whether the inputs are those of the layer before and of a skip connection together."""


@register("unet")
@dataclass(frozen=True)
class UNetConfig(Architecture):
    """The U-Net of EDM with two times; the defaults are SoFlow's on CIFAR-10, without dropout."""

    base: int = 128
    """Channels that `multipliers` multiply."""
    multipliers: tuple[int, ...] = (2, 2, 2)
    """Channels at each resolution, over `base`; each resolution has half the sides of the one before."""
    blocks: int = 4
    """Residual blocks at each resolution on the way down; one more on the way up."""
    attention: tuple[int, ...] = (16,)
    """Heights at which blocks have attention."""
    time_width: int = 256
    """Width of the positional embedding of each of the two times."""
    resample: tuple[int, ...] = (1, 3, 3, 1)
    """Taps of the filter that halves and doubles the sides."""
    augmentations: int = 0
    """Augmentation labels that the network is given, 6 with `training.augment` and in the official checkpoints; 0 is none."""
    dropout: float = 0.0
    """Share of a block's hidden values that a training step sets to 0, the same in all its passes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, largest in LARGEST.items():
            self.check_bound(name, largest)
        if not 1 <= len(self.multipliers) <= MOST_LEVELS or not all(0 < m <= 64 for m in self.multipliers):
            raise ValueError(
                f"multipliers are {self.multipliers}; give 1 to {MOST_LEVELS} whole numbers from 1 to 64"
            )
        halvings = 2 ** (len(self.multipliers) - 1)
        if self.height % halvings or self.width % halvings:
            raise ValueError(
                f"an input of {self.height} x {self.width} cannot be halved {len(self.multipliers) - 1} times;"
                f" choose fewer multipliers, or sides that {halvings} divides"
            )
        if not 2 <= len(self.resample) <= MOST_TAPS or len(self.resample) % 2 or sum(self.resample) <= 0:
            raise ValueError(f"resample is {self.resample}; give an even number of taps, such as 1, 3, 3, 1")
        if self.time_width % 2 or self.time_width < 4:
            raise ValueError(f"time_width is {self.time_width}; give an even number from 4 up")
        if not 0 <= self.augmentations <= MOST_AUGMENTATIONS:
            raise ValueError(
                f"augmentations is {self.augmentations}; give a number from 0 to {MOST_AUGMENTATIONS}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; give a share from 0 to below 1")
        for channels in {each for layer in self.layers() for each in (layer.inputs, layer.outputs)}:
            if channels != self.channels and channels % groups_of(channels):
                raise ValueError(
                    f"{channels} channels do not divide into {groups_of(channels)} groups of a norm; choose `base` a multiple of 32"
                )
        if self.guidance_scale:
            raise ValueError(
                "the U-Net does not take the guidance scale as a condition; train one scale, or a DiT"
            )

    @property
    def title(self) -> str:
        return f"UNet-{self.base}x{'-'.join(map(str, self.multipliers))}/{self.blocks}"

    @property
    def embedding(self) -> int:
        """Width of the embedding of the conditions."""
        return EMBEDDING * self.base

    @property
    def least_tensors(self) -> int:
        return 8 * self.blocks * len(self.multipliers)

    def build(self) -> UNet:
        return UNet(self)

    def side(self, level: int) -> tuple[int, int]:
        """Height and width at a resolution."""
        return self.height >> level, self.width >> level

    def layers(self) -> Iterator[Layer]:
        """The layers from input to output, by the names of their modules."""
        skips = [self.base]
        before = self.base
        last = len(self.multipliers) - 1
        for level, multiplier in enumerate(self.multipliers):
            side, name = self.side(level), f"enc.{_sides(self.side(level))}"
            if level == 0:
                yield Layer(f"{name}_conv", self.channels, self.base, side)
            else:
                yield Layer(f"{name}_down", before, before, side, "down")
                skips.append(before)
            for number in range(self.blocks):
                wide = self.base * multiplier
                yield Layer(f"{name}_block{number}", before, wide, side, None, side[0] in self.attention)
                before = wide
                skips.append(before)
        for level in range(last, -1, -1):
            side, name = self.side(level), f"dec.{_sides(self.side(level))}"
            if level == last:
                yield Layer(f"{name}_in0", before, before, side, None, attention=True)
                yield Layer(f"{name}_in1", before, before, side)
            else:
                yield Layer(f"{name}_up", before, before, side, "up")
            for number in range(self.blocks + 1):
                wide = self.base * self.multipliers[level]
                attention = number == self.blocks and side[0] in self.attention
                yield Layer(
                    f"{name}_block{number}", before + skips.pop(), wide, side, None, attention, joins=True
                )
                before = wide

    def parameters(self) -> int:
        """Number of values in the parameters; the filters of the resampling are none."""
        times, embedding = 2 * self.time_width, self.embedding
        labels = 0 if self.classes is None else self.classes * times + times
        total = labels + self.augmentations * times + times * embedding + embedding + embedding**2 + embedding
        for layer in self.layers():
            i, o = layer.inputs, layer.outputs
            if layer.name.endswith("_conv"):
                total += 9 * i * o + o
                continue
            total += 2 * i + 9 * i * o + o + embedding * o + o + 2 * o + 9 * o * o + o
            total += i * o + o if i != o or layer.direction else 0
            total += 2 * o + 3 * o * o + 3 * o + o * o + o if layer.attention else 0
        final = self.base * self.multipliers[0]
        return total + 2 * final + 9 * final * self.channels + self.channels

    def forward_flops(self) -> float:
        """FLOPs of one forward pass of one sample: convolutions, linear layers and attention."""
        times, embedding = 2 * self.time_width, self.embedding
        macs = 0 if self.classes is None else self.classes * times
        macs += self.augmentations * times + times * embedding + embedding**2
        for layer in self.layers():
            i, o, n = layer.inputs, layer.outputs, math.prod(layer.side)
            if layer.name.endswith("_conv"):
                macs += 9 * i * o * n
                continue
            macs += 9 * i * o * n + embedding * o + 9 * o * o * n
            macs += i * o * n if i != o or layer.direction else 0
            # A filter runs for the block's first convolution and for its skip connection, at the smaller of the two resolutions.
            taps = len(self.resample) ** 2 * i * (n // 4 if layer.direction == "up" else n)
            macs += 2 * taps if layer.direction else 0
            macs += 4 * o * o * n + 2 * n * n * o if layer.attention else 0
        return 2.0 * (macs + 9 * self.base * self.multipliers[0] * self.channels * self.height * self.width)

    @classmethod
    def example(cls, **given: Any) -> UNetConfig:
        return cls(
            **{"base": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "time_width": 16, **given}
        )

    def small(self) -> UNetConfig:
        """A U-Net with the same inputs and conditions, of 8 channels, one block at a resolution and at most two resolutions."""
        multipliers = self.multipliers[:2]
        most = 4 * 2 ** (len(multipliers) - 1)
        height, width = min(self.height, most), min(self.width, most)
        return replace(
            self,
            height=height,
            width=width,
            base=8,
            multipliers=multipliers,
            blocks=1,
            attention=(height,),
            time_width=16,
        )


def _sides(side: tuple[int, int]) -> str:
    return f"{side[0]}x{side[1]}"


class UNet(NetworkModule):
    """The network of a UNetConfig. A dropped label is a label vector of zeros.

    A pass draws nothing: dropout is off until `dropout_seed` is set, which a training step does anew for all of its passes. Passes of
    equally many rows then have the same masks, as both sides of a consistency loss need.
    """

    config: UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        times, embedding = 2 * config.time_width, config.embedding
        self.map_noise = Positional(config.time_width)
        self.map_label = None if config.classes is None else nn.Linear(config.classes, times)
        self.map_augment = (
            nn.Linear(config.augmentations, times, bias=False) if config.augmentations else None
        )
        self.map_layer0 = nn.Linear(times, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        for linear in (self.map_label, self.map_augment, self.map_layer0, self.map_layer1):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)
            if linear is not None and linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        for layer in config.layers():
            part, _, name = layer.name.partition(".")
            (self.enc if part == "enc" else self.dec)[name] = _module(layer, config)
        first, wide = _sides(config.side(0)), config.base * config.multipliers[0]
        self.dec[f"{first}_aux_norm"] = group_norm(wide)
        last = Resample(wide, config.channels, 3)
        with torch.no_grad():
            last.weight.mul_(1e-5)
        self.dec[f"{first}_aux_conv"] = last

    @property
    def repeated_blocks(self) -> Sequence[nn.Module]:
        return [
            module
            for part in (self.enc, self.dec)
            for module in part.values()
            if isinstance(module, UNetBlock)
        ]

    @property
    def dropout_share(self) -> float:
        return self.config.dropout

    def forward(
        self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        self.check_shape(x)
        if scale is not None:
            raise ValueError("this network takes no guidance scale; give none")
        embedding = self.condition(t, s, labels)
        masks = self._masks(x)
        skips: list[Tensor] = []
        for layer in self.config.layers():
            part, _, name = layer.name.partition(".")
            if part == "enc":
                module = self.enc[name]
                x = module(x, embedding, next(masks)) if isinstance(module, UNetBlock) else module(x)
                skips.append(x)
                continue
            if layer.joins:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self.dec[name](x, embedding, next(masks))
        first = _sides(self.config.side(0))
        result: Tensor = self.dec[f"{first}_aux_conv"](silu(self.dec[f"{first}_aux_norm"](x)))
        return result

    def condition(self, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """(B,), (B,), (B,) or None -> (B, embedding), in the precision of the weights even under autocast."""
        with torch.autocast(t.device.type, enabled=False):
            dtype = self.map_layer0.weight.dtype
            times = torch.cat([self.map_noise(t), self.map_noise(t - s)], dim=1).to(dtype)
            if self.map_label is not None:
                times = times + self.map_label(self._label_vectors(labels, t).to(dtype))
            if self.map_augment is not None:
                times = times + self.map_augment(self._augmentation_labels(times))
            embedded: Tensor = silu(self.map_layer1(silu(self.map_layer0(times))))
            return embedded

    def _label_vectors(self, labels: Tensor | None, t: Tensor) -> Tensor:
        """(B,) or None -> (B, classes): one at the label's place, times the root of their number; zeros for a dropped label."""
        classes = self.config.classes
        assert classes is not None
        if labels is None:
            if not self.config.null_label:
                raise ValueError(
                    "this network has no null label; give labels, or build it with null_label=True"
                )
            return t.new_zeros(len(t), classes)
        # An index beyond the classes is the null label, too.
        vectors = one_hot(torch.where(labels == NULL_LABEL, classes, labels), classes + 1)[:, :classes]
        return vectors * math.sqrt(classes)

    def _augmentation_labels(self, times: Tensor) -> Tensor:
        """(B, W) -> (B, augmentations): those of a training step, and zeros outside of it."""
        labels = self.augmentation if self.training else None
        if labels is None or len(times) == 0:
            return times.new_zeros(len(times), self.config.augmentations)
        if len(labels) != len(times):
            raise ValueError(
                f"a pass of {len(times)} of {len(labels)} augmented rows: augmentation needs a method whose passes have all, as "
                "SoFlow with flow_matching_share 0"
            )
        return labels.to(times)

    def _masks(self, x: Tensor) -> Iterator[Tensor | None]:
        """Factors of dropout of one block after the other; None where there is no dropout."""
        blocks = [layer for layer in self.config.layers() if not layer.name.endswith("_conv")]
        rate = self.config.dropout if self.training else 0.0
        if rate == 0 or self.dropout_seed is None:
            return iter([None] * len(blocks))
        generator = torch.Generator(x.device).manual_seed(self.dropout_seed)
        shapes = ((len(x), layer.outputs, *layer.side) for layer in blocks)
        return (_kept(shape, rate, generator, x) for shape in shapes)


def _module(layer: Layer, config: UNetConfig) -> nn.Module:
    if layer.name.endswith("_conv"):
        return Resample(layer.inputs, layer.outputs, 3)
    return UNetBlock(
        layer.inputs, layer.outputs, config.embedding, layer.direction, layer.attention, config.resample
    )


def _kept(shape: tuple[int, ...], rate: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """Factors 0, with the probability `rate`, and 1 / (1 - rate)."""
    drawn = torch.rand(shape, generator=generator, device=like.device)
    return (drawn >= rate).to(like.dtype) / (1 - rate)
