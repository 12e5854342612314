"""Diffusion transformer with adaLN-Zero (DiT, arXiv 2212.09748), conditioned on two times and a label.

The condition of a block is t_embedding(t) + s_embedding(t - s) + label_embedding(y); networks of other code may be given s
instead of t - s, or no second time (`DiTConfig.second_time`). Parameters have the names of
the official SoFlow checkpoints without their `network.` prefix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soflow_core.labels import NULL_LABEL
from soflow_core.networks import base
from soflow_core.networks.base import Architecture, NetworkModule
from soflow_core.networks.layers import Attention, Mlp, PatchEmbed
from soflow_core.registration import register

SecondTime = Literal["difference", "time", "none"]

FREQUENCIES = 256
"""Width of the sinusoidal time embedding."""

MAX_PERIOD = 10_000.0
"""Longest period of the sinusoids of times and positions."""

LARGEST = {
    **base.LARGEST,
    "patch": 2**10,
    "hidden": 2**16,
    "depth": 2**10,
    "heads": 2**10,
    "mlp_ratio": 2**8,
}
"""Upper bounds of the settings of a DiT, far above any that was trained: a typing error is refused before memory is taken."""

SMALL_SIDE, SMALL_HIDDEN, SMALL_HEADS, SMALL_DEPTH = 4, 32, 2, 2
"""Largest side in patches, and the sizes, of the small network that tries a step."""


@register("dit")
@dataclass(frozen=True)
class DiTConfig(Architecture):
    """Architecture of a DiT."""

    patch: int
    """Side of a square patch, in pixels of the input."""
    hidden: int
    """Width of a token."""
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    second_time: SecondTime = "difference"
    """What the second embedding is given: t - s, as in SoFlow, MeanFlow and α-Flow, or s. `none`: there is no second embedding,
    as in networks of velocities.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, largest in LARGEST.items():
            self.check_bound(name, largest)
        if self.height % self.patch or self.width % self.patch:
            raise ValueError(
                f"an input of {self.height} x {self.width} is not divisible by a patch of {self.patch};"
                " choose a patch that divides both sides"
            )
        if self.hidden % self.heads:
            raise ValueError(
                f"a width of {self.hidden} does not split over {self.heads} heads; choose a divisor"
            )
        if self.hidden % 4:
            raise ValueError(f"a width of {self.hidden} has no 2-D sin-cos positions; choose a multiple of 4")

    @property
    def title(self) -> str:
        return f"DiT-{self.hidden}x{self.depth}/{self.patch}"

    @property
    def tokens(self) -> int:
        """Number of patches of a sample."""
        return (self.height // self.patch) * (self.width // self.patch)

    @property
    def times(self) -> int:
        """Number of embeddings of times."""
        return 1 if self.second_time == "none" else 2

    @property
    def least_tensors(self) -> int:
        return self.depth

    def build(self) -> DiT:
        return DiT(self)

    def parameters(self) -> int:
        """Number of values in the parameters, the fixed position table included."""

        def linear(inputs: int, outputs: int) -> int:
            return inputs * outputs + outputs

        d, mlp = self.hidden, int(self.hidden * self.mlp_ratio)
        pixels = self.channels * self.patch**2
        labels = 0 if self.classes is None else (self.classes + int(self.null_label)) * d
        conditions = (self.times + self.guidance_scale) * (linear(FREQUENCIES, d) + linear(d, d))
        block = linear(d, 3 * d) + linear(d, d) + linear(d, mlp) + linear(mlp, d) + linear(d, 6 * d)
        output = linear(d, pixels) + linear(d, 2 * d)
        return linear(pixels, d) + conditions + labels + self.tokens * d + self.depth * block + output

    def trained_parameters(self) -> int:
        """All but the table of positions."""
        return self.parameters() - self.tokens * self.hidden

    def forward_flops(self) -> float:
        """FLOPs of one forward pass of one sample: patches, blocks, attention products, output; additions are left out."""
        tokens, d = self.tokens, self.hidden
        per_block = (4 + 2 * self.mlp_ratio) * tokens * d * d + 2 * tokens * tokens * d + 6 * d * d
        patch = self.channels * self.patch**2 * d * tokens
        # Times, the guidance scale where it is a condition, and the output layer's modulation.
        embeddings = (self.times + self.guidance_scale) * (FREQUENCIES * d + d * d) + 2 * d * d
        return 2 * (self.depth * per_block + 2 * patch + embeddings)

    @classmethod
    def example(cls, **given: Any) -> DiTConfig:
        return cls(**{"patch": 2, "hidden": 16, "depth": 2, "heads": 2, **given})

    def small(self) -> DiTConfig:
        """A DiT with the same inputs and conditions, of at most 4 x 4 patches, two blocks and 32 channels a token."""
        most = SMALL_SIDE * self.patch
        return replace(
            self,
            height=min(self.height, most),
            width=min(self.width, most),
            hidden=SMALL_HIDDEN,
            depth=min(self.depth, SMALL_DEPTH),
            heads=SMALL_HEADS,
        )


class TimeEmbedder(nn.Module):
    """Embedding of a time, unscaled: sinusoids, then two linear layers. (B,) -> (B, hidden)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        half, weight = FREQUENCIES // 2, cast(nn.Linear, self.mlp[0]).weight
        # At least float32, also with bfloat16 weights: a time in bfloat16 has three digits.
        precise = torch.promote_types(weight.dtype, torch.float32)
        exponents = torch.arange(half, dtype=precise, device=t.device) / half
        angles = t[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
        sinusoids = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
        embedded: Tensor = self.mlp(sinusoids.to(weight.dtype))
        return embedded


class LabelEmbedder(nn.Module):
    """Table of label embeddings, with a last row for the null label if any: (B,) int64 -> (B, hidden)."""

    def __init__(self, classes: int, null_label: bool, hidden: int) -> None:
        super().__init__()
        self.classes = classes
        self.null_label = null_label
        self.embedding_table = nn.Embedding(classes + int(null_label), hidden)

    def forward(self, labels: Tensor) -> Tensor:
        rows: Tensor = self.embedding_table(torch.where(labels == NULL_LABEL, self.classes, labels))
        return rows


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, N, D), (B, D), (B, D) -> (B, N, D): x (1 + scale) + shift."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Transformer block: attention and MLP, each modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, hidden: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden, int(hidden * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D), (B, D) -> (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Output layer, tokens to pixels: (B, N, D), (B, D) -> (B, N, patch * patch * channels)."""

    def __init__(self, hidden: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        pixels: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return pixels


class DiT(NetworkModule):
    """Network F(x, t, s, labels, scale): (B, C, H, W), (B,), (B,), (B,) int64 or None -> (B, C, H, W).

    None labels are the null label in every row. `scale` (B,) is the guidance scale, where it is a condition; None is 1,
    no guidance. Times are embedded unscaled. `checkpoint_blocks` recomputes each block in the backward pass, for less
    memory.
    """

    config: DiTConfig

    def __init__(self, config: DiTConfig, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = checkpoint_blocks
        self.x_embedder = PatchEmbed(config.channels, config.patch, config.hidden)
        self.t_embedder = TimeEmbedder(config.hidden)
        self.s_embedder = None if config.second_time == "none" else TimeEmbedder(config.hidden)
        self.w_embedder = TimeEmbedder(config.hidden) if config.guidance_scale else None
        self.y_embedder = (
            None
            if config.classes is None
            else LabelEmbedder(config.classes, config.null_label, config.hidden)
        )
        positions = sincos_positions(
            config.hidden, config.height // config.patch, config.width // config.patch
        )
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(config.hidden, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(config.hidden, config.patch, config.channels)
        self.initialize()

    @property
    def repeated_blocks(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def initialize(self) -> None:
        """Initial weights: Xavier linear layers and s embedding, N(0, 0.02) label and t embeddings, zero modulation
        and output layers, so that F = 0. The embedding of the guidance scale is 0, too.
        """

        def xavier(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        self.apply(xavier)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(cast(Tensor, self.x_embedder.proj.bias))
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder.") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            if name.startswith("w_embedder.mlp.2"):
                nn.init.zeros_(parameter)
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        self.check_shape(x)
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.condition(t, s, labels, scale)
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, use_reentrant=False)
            else:
                tokens = block(tokens, condition)
        return self.unpatchify(self.final_layer(tokens, condition))

    def condition(self, t: Tensor, s: Tensor, labels: Tensor | None, scale: Tensor | None = None) -> Tensor:
        """(B,), (B,), (B,) or None, (B,) or None -> (B, hidden), in the precision of the weights even under autocast.

        Difference quotients over times need it, and it costs next to nothing.
        """
        with torch.autocast(t.device.type, enabled=False):
            condition: Tensor = self.t_embedder(t)
            if self.s_embedder is not None:
                second = s if self.config.second_time == "time" else t - s
                condition = condition + self.s_embedder(second)
            if self.w_embedder is not None:
                condition = condition + self.w_embedder(
                    torch.zeros_like(t) if scale is None else 1 - 1 / scale
                )
            elif scale is not None:
                raise ValueError(
                    "this network takes no guidance scale; build it with guidance_scale=True, or give none"
                )
            if self.y_embedder is None:
                return condition
            if labels is None:
                if not self.y_embedder.null_label:
                    raise ValueError(
                        "this network has no null label; give labels, or build it with null_label=True"
                    )
                labels = torch.full(t.shape, NULL_LABEL, dtype=torch.int64, device=t.device)
            return condition + self.y_embedder(labels)

    def unpatchify(self, pixels: Tensor) -> Tensor:
        """(B, N, patch * patch * channels) -> (B, C, H, W)."""
        c = self.config
        rows, columns = c.height // c.patch, c.width // c.patch
        grid = pixels.reshape(-1, rows, columns, c.patch, c.patch, c.channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, c.channels, c.height, c.width)


def sincos_positions(hidden: int, rows: int, columns: int) -> Tensor:
    """-> (rows * columns, hidden): position embeddings; the first half encodes the column, the second the row."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    halves = [_sincos(place.reshape(-1), hidden // 2) for place in (column, row)]
    return torch.cat(halves, dim=1).float()


def _sincos(place: Tensor, width: int) -> Tensor:
    """(N,) -> (N, width): sines, then cosines, computed in float64."""
    exponents = torch.arange(width // 2, dtype=torch.float64) / (width / 2)
    angles = place.double()[:, None] * MAX_PERIOD**-exponents
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
