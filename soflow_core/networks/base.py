"""Interface of a network: its architecture (settings, size and cost, known before it is built), and the module that it builds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from soflow_core.registration import Registry
from soflow_core.settings import STRICT, check_values

LARGEST = {"channels": 2**12, "height": 2**14, "width": 2**14, "classes": 2**24}
"""Upper bounds of what a network is made for, far above any that was trained: a typing error is refused before memory is taken."""


@dataclass(frozen=True)
class Architecture(ABC):
    """Settings of a network; subclasses are frozen dataclasses.

    The fields of this class come from the data and the method, those of a subclass are its settings in a sweep file.
    Subclasses that check their own settings call `super().__post_init__()`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    kind: ClassVar[str]
    """Name of the network in sweep files and weights headers, given by `@register`."""
    recomputes: ClassVar[bool] = False
    """Whether its network heeds `checkpoint_blocks`."""

    channels: int
    height: int
    width: int
    classes: int | None = field(default=None, kw_only=True)
    """Number of classes; None is an unconditional network."""
    null_label: bool = field(default=False, kw_only=True)
    """Whether the label table has a row, index `classes`, for a dropped label."""
    guidance_scale: bool = field(default=False, kw_only=True)
    """Whether the guidance scale is a condition beside times and label, as an embedding of 1 - 1/w."""
    guidance_interval: bool = field(default=False, kw_only=True)
    """Whether both ends of the guidance interval are conditions beside the scale."""

    def __post_init__(self) -> None:
        check_values(self)
        for name, largest in LARGEST.items():
            self.check_bound(name, largest)
        if self.null_label and self.classes is None:
            raise ValueError("null_label needs classes; give their number or set null_label to false")
        if self.guidance_scale and self.classes is None:
            raise ValueError("guidance_scale needs classes; give their number or set guidance_scale to false")
        if self.guidance_interval and not self.guidance_scale:
            raise ValueError(
                "guidance_interval needs guidance_scale; set both, or guidance_interval to false"
            )

    def check_bound(self, name: str, largest: int) -> None:
        """Raises ValueError where a setting is not above 0 and at most `largest`; None passes."""
        value = getattr(self, name)
        if value is not None and not 0 < value <= largest:
            raise ValueError(f"{name} is {value}; it must be above 0 and at most {largest}")

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""
        return self.channels, self.height, self.width

    @property
    @abstractmethod
    def title(self) -> str:
        """A few characters that tell sizes of the network apart, such as `DiT-384x12/2`."""

    @abstractmethod
    def build(self) -> NetworkModule:
        """The network with initial weights, drawn from torch's global generator, on the default device."""

    @abstractmethod
    def parameters(self) -> int:
        """Number of values in the network's parameters, fixed ones included; nothing is built."""

    def trained_parameters(self) -> int:
        """Number of values that are trained; all of them by default."""
        return self.parameters()

    @abstractmethod
    def forward_flops(self) -> float:
        """FLOPs of one forward pass of one sample; a multiply-accumulate counts as two."""

    @property
    def has_velocity_head(self) -> bool:
        """Whether the network has a second head, which predicts the velocity."""
        return False

    def second_head_flops(self) -> float:
        """FLOPs that a pass of one sample through both heads has more than one through either."""
        return 0.0

    def block_tokens(self, block: int) -> tuple[int, int, int]:
        """Rows, columns and width of the tokens of patches behind a block, counted from 1.

        Raises ValueError where there is no such block, or where the network has no tokens.
        """
        del block
        raise ValueError(f"a network of kind {self.kind} has no blocks of tokens")

    @classmethod
    def example(cls, **given: Any) -> Architecture:
        """A small network of this kind for a sample shape and classes, that the conformance suite tests: the settings' defaults."""
        return cls(**given)

    def small(self) -> Architecture:
        """A network of this kind with the same inputs and conditions that takes milliseconds on a CPU; it is this one by default."""
        return self

    @property
    def least_tensors(self) -> int:
        """Number of tensors that a state of this network has at the least; it is compared with a file's before anything is built."""
        return 0


NETWORKS: Registry[Architecture] = Registry("network", Architecture, "kind", default="dit")  # type: ignore[type-abstract]
"""Name of a network -> its architecture. Settings without a name are a DiT's: before 0.2 there was no other."""


class TokenTap:
    """Collects the tokens (B, N, D) of patches behind one block, of each pass with gradient, in the order of the passes."""

    def __init__(self, block: int) -> None:
        self.block = block
        """Counted from 1."""
        self.tokens: list[Tensor] = []

    def offer(self, block: int, tokens: Tensor) -> None:
        """Keeps the tokens behind its own block where the pass has a gradient."""
        if block == self.block and torch.is_grad_enabled():
            self.tokens.append(tokens)


class NetworkModule(nn.Module):
    """Network F(x, t, s, labels, scale): (B, C, H, W), (B,), (B,), (B,) int64 or None, (B,) or None -> (B, C, H, W).

    t and s are times from 0 (data) to 1 (noise), s <= t. A label is from 0 to classes - 1, or NULL_LABEL where it is dropped; None
    labels are the null label in every row. `scale` is the guidance scale where it is a condition; None is 1, no guidance. Where
    its interval is one, too, `scale` is (B, 3): scale, first and last time; scales alone are those of all times. A network of two
    heads takes another argument `head` (`soflow_core.passes.Head`).

    Rows are independent of each other, so that a batch can be split over ranks. A pass draws nothing, in training as in evaluation:
    all randomness of a step comes from the objective, but for masks of dropout, which are a function of a seed that the step sets
    (`dropout_seed`). Without autocast it is a float32 pass on float32 weights.
    """

    config: Architecture
    dropout_seed: int | None = None
    """Seed of the masks of dropout in training mode; None is no dropout. A training step sets it (`TrainStep`)."""

    augmentation: Tensor | None = None
    """(B, A): augmentation labels of the rows of a training step, which a training step sets (`soflow_core.augmentation`)."""

    tap: TokenTap | None = None
    """Where tokens of a block are kept, set by a training step (`soflow_core.alignment`); networks with `block_tokens` offer them."""

    checkpoint_blocks: bool = False
    """Whether blocks are run again in the backward pass, so that of their activations the inputs alone are kept until then (activation
    checkpointing). A training step sets it, of networks whose architecture says `recomputes`.
    """

    @property
    def dropout_share(self) -> float:
        """Share of hidden values that a training step sets to 0; most networks have none."""
        return 0.0

    @property
    def repeated_blocks(self) -> Sequence[nn.Module]:
        """Submodules that FSDP gathers, and torch.compile compiles, one at a time; the rest is one part. None by default."""
        return ()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        raise NotImplementedError

    def check_shape(self, x: Tensor) -> None:
        """Raises ValueError where an input (B, C, H, W) has other sides or channels than the architecture."""
        expected = self.config.sample_shape
        if tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"the input has rows of shape {tuple(x.shape[1:])}; this network takes {expected}"
            )
