"""Settings of Adam, and its learning rate as a function of the step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from soflow_core.registration import part_setting
from soflow_core.schedule_shapes import DECAYS
from soflow_core.settings import STRICT, check_values


@dataclass(frozen=True)
class OptimizerConfig:
    """Variant and settings of Adam; the defaults are SoFlow's on ImageNet."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: Literal["adamw", "radam", "adam"] = "adamw"
    lr: float = 1e-4
    """Learning rate; the highest one where it varies."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    eps: float = 1e-8
    warmup_steps: int = 0
    """Steps over which the learning rate grows linearly to `lr`; 0 is none."""
    decay: str = part_setting(DECAYS, "constant")
    """How the learning rate falls after the warm-up, a registered `DecayShape`."""
    final_lr: float = 0.0
    """The learning rate of the last step where it falls."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr is {self.lr}; a learning rate above 0 is needed")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas are {self.betas}; each must be from 0 to below 1")
        for name, value in (("weight_decay", self.weight_decay), ("eps", self.eps)):
            if value < 0:
                raise ValueError(f"optimizer.{name} is {value}; give 0 or more")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps is {self.warmup_steps}; give 0 or more")
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"optimizer.final_lr is {self.final_lr}; give 0 up to lr, which is {self.lr}")

    def learning_rate(self, step: int, total_steps: int) -> float:
        """Learning rate of the step after `step` finished steps of `total_steps`.

        lr (k + 1) / W in the W steps of the warm-up; then constant, or falling from lr at the last warm-up step (the
        first step where there is none) to final_lr at the last step of training.
        """
        if step < self.warmup_steps:
            return self.lr * ((step + 1) / self.warmup_steps)
        peak, last = max(self.warmup_steps - 1, 0), total_steps - 1
        share = DECAYS.named(self.decay).share(1.0 if step >= last else (step - peak) / (last - peak))
        if share >= 1:
            return self.final_lr
        return max(self.final_lr, self.lr - (self.lr - self.final_lr) * share)

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer, fused where torch has a fused kernel for the device."""
        settings: dict[str, Any] = {
            "lr": self.lr,
            "betas": self.betas,
            "weight_decay": self.weight_decay,
            "eps": self.eps,
        }
        if self.name == "radam":
            return uncompiled(torch.optim.RAdam)(parameters, **settings, foreach=True)
        kind = torch.optim.AdamW if self.name == "adamw" else torch.optim.Adam
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
        return uncompiled(kind)(parameters, **settings, fused=fused, foreach=None if fused else True)


def uncompiled(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The optimizer without torch's wrappers that matter to compiled code alone; optimizers are never compiled here.

    The first call of a wrapper imports torch's compiler, which takes most of a second in every process that trains.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    step = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), {**methods, "step": step})
