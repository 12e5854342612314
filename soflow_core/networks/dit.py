"""Diffusion transformer with adaLN-Zero (DiT, arXiv 2212.09748), conditioned on two times and a label.

The condition of a block is t_embedding(t) + s_embedding(t - s) + label_embedding(y); networks of other code may be given s
instead of t - s, or no second time (`DiTConfig.second_time`). Parameters have the names of
the official SoFlow checkpoints without their `network.` prefix.

Seven settings depart from that network, each on its own: `qk_norm`, `rope`, `swiglu`, `registers`, `condition_tokens`,
`velocity_blocks` and `difference_alone`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soflow_core.labels import NULL_LABEL
from soflow_core.networks import base
from soflow_core.networks.base import Architecture, NetworkModule
from soflow_core.networks.blocks import Block, FinalLayer
from soflow_core.networks.embeddings import FREQUENCIES, MAX_PERIOD, LabelEmbedder, TimeEmbedder
from soflow_core.networks.layers import GatedMlp, Mlp, PatchEmbed
from soflow_core.networks.positions import rotary_positions, sincos_positions
from soflow_core.passes import Head
from soflow_core.registration import register

__all__ = [
    "FREQUENCIES",
    "LARGEST",
    "MAX_PERIOD",
    "DiT",
    "DiTConfig",
    "FinalLayer",
    "LabelEmbedder",
    "SecondTime",
    "TimeEmbedder",
    "sincos_positions",
]

SecondTime = Literal["difference", "time", "none"]

LARGEST = {
    **base.LARGEST,
    "patch": 2**10,
    "hidden": 2**16,
    "depth": 2**10,
    "heads": 2**10,
    "mlp_ratio": 2**8,
}
"""Upper bounds of the settings of a DiT, far above any that was trained: a typing error is refused before memory is taken."""

MOST_TOKENS = {"registers": 2**12, "condition_tokens": 2**10}
"""Upper bounds of the numbers of tokens beside the patches, which may be 0."""

PARITY: dict[str, Any] = {
    "qk_norm": False,
    "rope": False,
    "swiglu": False,
    "registers": 0,
    "condition_tokens": 0,
    "velocity_blocks": 0,
    "difference_alone": False,
}
"""Settings that the paper's network does not have, with the values at which this one is the paper's."""

SMALL_SIDE, SMALL_HIDDEN, SMALL_HEADS, SMALL_DEPTH, SMALL_TOKENS = 4, 32, 2, 2, 2
"""Largest side in patches, and the sizes, of the small network that tries a step."""


@register("dit")
@dataclass(frozen=True)
class DiTConfig(Architecture):
    """Architecture of a DiT."""

    recomputes: ClassVar[bool] = True

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
    qk_norm: bool = False
    """Root mean square norm of each query and key, with learned factors (arXiv 2302.05442)."""
    rope: bool = False
    """Queries and keys turned by row and column of their patch (RoPE), beside the table of positions that is added to patches."""
    swiglu: bool = False
    """MLP with a gate (SwiGLU), two thirds as wide, so that it has about as many parameters."""
    registers: int = 0
    """Learned tokens beside the patches (arXiv 2309.16588), which no output is read from."""
    condition_tokens: int = 0
    """Tokens for each condition (times, guidance scale, label) before the patches, in place of adaLN; 0 is adaLN."""
    velocity_blocks: int = 0
    """Last blocks of which a second head, for the velocity, has its own, with an output layer; 0 is no second head."""
    difference_alone: bool = False
    """Whether t - s is the only time that the network is given, and t itself is none of its conditions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, largest in LARGEST.items():
            self.check_bound(name, largest)
        for name, largest in MOST_TOKENS.items():
            if not 0 <= getattr(self, name) <= largest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to {largest}")
        if not 0 <= self.velocity_blocks <= self.depth:
            raise ValueError(
                f"velocity_blocks is {self.velocity_blocks}; it must be from 0 to the depth, {self.depth}"
            )
        if self.difference_alone and self.second_time != "difference":
            raise ValueError(
                f"difference_alone leaves t - s as the only time, and second_time is {self.second_time}; leave one of them out"
            )
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
        if self.rope and self.hidden // self.heads % 4:
            raise ValueError(
                f"rope turns channels of a head in fours, and {self.hidden} over {self.heads} heads is"
                f" {self.hidden // self.heads} each; choose a number of heads that leaves a multiple of 4"
            )

    @property
    def title(self) -> str:
        return f"DiT-{self.hidden}x{self.depth}/{self.patch}"

    @property
    def patches(self) -> int:
        """Number of patches of a sample."""
        return (self.height // self.patch) * (self.width // self.patch)

    @property
    def tokens(self) -> int:
        """Number of tokens in a block: patches, and those of conditions and registers before them."""
        return self.patches + self.registers + self.conditions * self.condition_tokens

    @property
    def has_velocity_head(self) -> bool:
        return self.velocity_blocks > 0

    @property
    def times(self) -> int:
        """Number of embeddings of times."""
        return 1 if self.second_time == "none" or self.difference_alone else 2

    @property
    def embedders(self) -> int:
        """Number of embeddings of numbers: times, guidance scale, both ends of its interval."""
        return self.times + self.guidance_scale + 2 * self.guidance_interval

    @property
    def conditions(self) -> int:
        """Number of conditions: times, guidance scale and interval, label."""
        return self.embedders + (self.classes is not None)

    @property
    def mlp_width(self) -> int:
        """Width of the MLP's hidden layer; that of a gated one is two thirds of it, rounded up to a multiple of 8."""
        width = int(self.hidden * self.mlp_ratio)
        return -(-2 * width // 24) * 8 if self.swiglu else width

    @property
    def least_tensors(self) -> int:
        return self.depth

    def build(self) -> DiT:
        return DiT(self)

    def parameters(self) -> int:
        """Number of values in the parameters, the fixed tables of positions included."""

        def linear(inputs: int, outputs: int) -> int:
            return inputs * outputs + outputs

        d, mlp, adaln = self.hidden, self.mlp_width, not self.condition_tokens
        pixels = self.channels * self.patch**2
        labels = 0 if self.classes is None else (self.classes + int(self.null_label)) * d
        embedders = self.embedders * (linear(FREQUENCIES, d) + linear(d, d)) + labels
        added = (self.registers + self.conditions * self.condition_tokens) * d
        block = linear(d, 3 * d) + linear(d, d) + (1 + self.swiglu) * linear(d, mlp) + linear(mlp, d)
        # Modulation; or factors and shifts of two norms, and two gates.
        block += linear(d, 6 * d) if adaln else 6 * d
        block += 2 * (d // self.heads) if self.qk_norm else 0
        output = linear(d, pixels) + (linear(d, 2 * d) if adaln else 2 * d)
        heads = (self.depth + self.velocity_blocks) * block + (1 + self.has_velocity_head) * output
        return linear(pixels, d) + embedders + added + heads + self._fixed()

    def _fixed(self) -> int:
        """Number of values in the tables of positions."""
        return self.patches * self.hidden + (self.tokens * self.hidden // self.heads if self.rope else 0)

    def trained_parameters(self) -> int:
        """All but the tables of positions."""
        return self.parameters() - self._fixed()

    def forward_flops(self) -> float:
        """FLOPs of one forward pass of one sample: all matrix products, as torch's FlopCounterMode counts them."""
        d = self.hidden
        patch = self.channels * self.patch**2 * d * self.patches
        embeddings = self.embedders * (FREQUENCIES * d + d * d)
        return float(2 * (patch + embeddings)) + self._head_flops(self.depth)

    def second_head_flops(self) -> float:
        return self._head_flops(self.velocity_blocks) if self.has_velocity_head else 0.0

    def _head_flops(self, blocks: int) -> float:
        """FLOPs of so many blocks and an output layer with its modulation."""
        n, d, adaln = self.tokens, self.hidden, not self.condition_tokens
        mlp = (2 + self.swiglu) * n * d * self.mlp_width
        per_block = 4 * n * d * d + mlp + 2 * n * n * d + (6 * d * d if adaln else 0)
        output = self.channels * self.patch**2 * d * self.patches + (2 * d * d if adaln else 0)
        return float(2 * (blocks * per_block + output))

    def block_tokens(self, block: int) -> tuple[int, int, int]:
        if not 1 <= block <= self.depth:
            raise ValueError(f"there is no block {block}; this network has blocks 1 to {self.depth}")
        return self.height // self.patch, self.width // self.patch, self.hidden

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
            registers=min(self.registers, SMALL_TOKENS),
            condition_tokens=min(self.condition_tokens, SMALL_TOKENS),
            velocity_blocks=min(self.velocity_blocks, self.depth, SMALL_DEPTH),
        )


class DiT(NetworkModule):
    """Network F(x, t, s, labels, scale): (B, C, H, W), (B,), (B,), (B,) int64 or None -> (B, C, H, W).

    None labels are the null label in every row. `scale` (B,) is the guidance scale, where it is a condition, (B, 3) with its interval;
    None is 1, no guidance. Times are embedded unscaled. `checkpoint_blocks` recomputes each block in the backward pass, for less
    memory. With `velocity_blocks` there are two heads, and `head` says whose output a pass has; of both the channels are those of
    the average velocity, then those of the velocity.
    """

    config: DiTConfig

    def __init__(self, config: DiTConfig, checkpoint_blocks: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = checkpoint_blocks
        self.x_embedder = PatchEmbed(config.channels, config.patch, config.hidden)
        self.t_embedder = None if config.difference_alone else TimeEmbedder(config.hidden)
        self.s_embedder = None if config.second_time == "none" else TimeEmbedder(config.hidden)
        self.w_embedder = TimeEmbedder(config.hidden) if config.guidance_scale else None
        self.start_embedder = TimeEmbedder(config.hidden) if config.guidance_interval else None
        self.end_embedder = TimeEmbedder(config.hidden) if config.guidance_interval else None
        self.y_embedder = (
            None
            if config.classes is None
            else LabelEmbedder(config.classes, config.null_label, config.hidden)
        )
        positions = sincos_positions(
            config.hidden, config.height // config.patch, config.width // config.patch
        )
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.rope = self._rotations()
        added = config.condition_tokens
        self.condition_embed = (
            nn.Parameter(torch.empty(config.conditions, added, config.hidden)) if added else None
        )
        self.registers = (
            nn.Parameter(torch.empty(config.registers, config.hidden)) if config.registers else None
        )
        self.blocks = _blocks(config, config.depth)
        self.final_layer = FinalLayer(config.hidden, config.patch, config.channels, adaln=not added)
        self.velocity_blocks: nn.ModuleList | None = None
        self.velocity_layer: FinalLayer | None = None
        if config.has_velocity_head:
            self.velocity_blocks = _blocks(config, config.velocity_blocks)
            self.velocity_layer = FinalLayer(config.hidden, config.patch, config.channels, adaln=not added)
        self.initialize()

    def _rotations(self) -> nn.Parameter | None:
        """The fixed table of rotations of all tokens; it is part of the state, as the table of positions is."""
        c = self.config
        if not c.rope:
            return None
        table = rotary_positions(
            c.hidden // c.heads, c.height // c.patch, c.width // c.patch, c.tokens - c.patches
        )
        return nn.Parameter(table, requires_grad=False)

    @property
    def repeated_blocks(self) -> Sequence[nn.Module]:
        return [*self.blocks, *(self.velocity_blocks or ())]

    def initialize(self) -> None:
        """Initial weights: Xavier linear layers and s embedding, N(0, 0.02) label and t embeddings, zero modulation
        and output layers, so that F = 0. The embeddings of guidance scale and interval are 0, too. Registers and what is added to
        condition tokens are N(0, 0.02), and gates are 0.
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
            if name.startswith(("w_embedder.mlp.2", "start_embedder.mlp.2", "end_embedder.mlp.2")):
                nn.init.zeros_(parameter)
            if "adaLN_modulation" in name or name.startswith(("final_layer.linear", "velocity_layer.linear")):
                nn.init.zeros_(parameter)
            if name in ("registers", "condition_embed"):
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
        head: Head = "average",
    ) -> Tensor:
        self.check_shape(x)
        if head != "average" and not self.config.has_velocity_head:
            raise ValueError("this network has no head for the velocity; build it with velocity_blocks")
        patches = self.x_embedder(x) + self.pos_embed
        conditions = self.conditions(t, s, labels, scale)
        tokens = self._with_tokens(patches, conditions)
        condition = None if self.condition_embed is not None else _sum(conditions)
        shared = self.config.depth - (0 if head == "average" else self.config.velocity_blocks)
        blocks = list(self.blocks)
        tokens = self._through(blocks[:shared], tokens, condition, tapped_from=1)
        outputs = []
        if head != "velocity":
            own = self._through(blocks[shared:], tokens, condition, tapped_from=shared + 1)
            outputs.append(self._pixels(own, condition, self.final_layer))
        if self.velocity_blocks is not None and self.velocity_layer is not None and head != "average":
            own = self._through(self.velocity_blocks, tokens, condition)
            outputs.append(self._pixels(own, condition, self.velocity_layer))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _through(
        self,
        blocks: Iterable[nn.Module],
        tokens: Tensor,
        condition: Tensor | None,
        tapped_from: int | None = None,
    ) -> Tensor:
        """Tokens (B, N, D) behind some blocks; their number counts from `tapped_from` where they may be tapped."""
        for number, block in enumerate(blocks, start=tapped_from or 0):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                # Nothing is drawn in a pass, and a CUDA graph could not record how generators stand.
                tokens = checkpoint(
                    block, tokens, condition, self.rope, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens = block(tokens, condition, self.rope)
            if self.tap is not None and tapped_from is not None:
                self.tap.offer(number, tokens[:, -self.config.patches :])
        return tokens

    def _pixels(self, tokens: Tensor, condition: Tensor | None, layer: nn.Module) -> Tensor:
        """The image of tokens: (B, N, D) -> (B, C, H, W)."""
        return self.unpatchify(layer(tokens[:, -self.config.patches :], condition))

    def _with_tokens(self, patches: Tensor, conditions: list[Tensor]) -> Tensor:
        """(B, N, D), each (B, D) -> (B, N + ..., D): condition tokens, then registers, where there are any, then patches."""
        before = []
        if self.condition_embed is not None:
            # (B, conditions, 1, D) + (conditions, condition_tokens, D)
            embedded = torch.stack(conditions, dim=1)[:, :, None] + self.condition_embed
            before.append(embedded.flatten(1, 2))
        if self.registers is not None:
            before.append(self.registers.expand(len(patches), -1, -1))
        # Tokens under autocast have the precision of the table of positions.
        return (
            torch.cat([*(each.to(patches.dtype) for each in before), patches], dim=1) if before else patches
        )

    def condition(self, t: Tensor, s: Tensor, labels: Tensor | None, scale: Tensor | None = None) -> Tensor:
        """(B,), (B,), (B,) or None, (B,) or None -> (B, hidden): the sum of the conditions' embeddings."""
        return _sum(self.conditions(t, s, labels, scale))

    def conditions(
        self, t: Tensor, s: Tensor, labels: Tensor | None, scale: Tensor | None = None
    ) -> list[Tensor]:
        """The embeddings of times, guidance, label, each (B, hidden), in the precision of the weights even under autocast.

        Difference quotients over times need it, and it costs next to nothing.
        """
        with torch.autocast(t.device.type, enabled=False):
            embedded: list[Tensor] = [] if self.t_embedder is None else [self.t_embedder(t)]
            if self.s_embedder is not None:
                embedded.append(self.s_embedder(s if self.config.second_time == "time" else t - s))
            if self.w_embedder is not None:
                embedded += self._guidance(self.w_embedder, t, scale)
            elif scale is not None:
                raise ValueError(
                    "this network takes no guidance scale; build it with guidance_scale=True, or give none"
                )
            if self.y_embedder is None:
                return embedded
            if labels is None:
                if not self.y_embedder.null_label:
                    raise ValueError(
                        "this network has no null label; give labels, or build it with null_label=True"
                    )
                labels = torch.full(t.shape, NULL_LABEL, dtype=torch.int64, device=t.device)
            return [*embedded, self.y_embedder(labels)]

    def _guidance(self, embedder: nn.Module, t: Tensor, scale: Tensor | None) -> list[Tensor]:
        """The embeddings of 1 - 1/w, and of both ends of the interval where it is a condition: 0 and 1 where `scale` has none."""
        given = 1 if scale is None or scale.dim() == 1 else scale.shape[1]
        if given == 3 and self.start_embedder is None:
            raise ValueError(
                "this network takes no guidance interval; build it with guidance_interval=True, or give scales alone"
            )
        w = scale if scale is None or given == 1 else scale[:, 0]
        embedded = [embedder(torch.zeros_like(t) if w is None else 1 - 1 / w)]
        if self.start_embedder is None or self.end_embedder is None:
            return embedded
        whole = torch.zeros_like(t), torch.ones_like(t)
        first, last = whole if scale is None or given == 1 else (scale[:, 1], scale[:, 2])
        return [*embedded, self.start_embedder(first), self.end_embedder(last)]

    def unpatchify(self, pixels: Tensor) -> Tensor:
        """(B, N, patch * patch * channels) -> (B, C, H, W)."""
        c = self.config
        rows, columns = c.height // c.patch, c.width // c.patch
        grid = pixels.reshape(-1, rows, columns, c.patch, c.patch, c.channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, c.channels, c.height, c.width)


def _blocks(config: DiTConfig, count: int) -> nn.ModuleList:
    """So many blocks of a network."""
    mlp = GatedMlp if config.swiglu else Mlp
    return nn.ModuleList(
        Block(
            config.hidden,
            config.heads,
            mlp(config.hidden, config.mlp_width),
            config.qk_norm,
            not config.condition_tokens,
        )
        for _ in range(count)
    )


def _sum(terms: list[Tensor]) -> Tensor:
    """The sum of at least one tensor, from the first to the last."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
