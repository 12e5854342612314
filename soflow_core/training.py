"""One optimizer step of any objective, with everything a checkpoint of it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from soflow_core.ema import EMA, Exponential
from soflow_core.objectives.base import Batch, Draws, Loss, Objective
from soflow_core.passes import Network, PassPolicy, Precision


@dataclass(frozen=True)
class OptimizerConfig:
    """An Adam and its settings; the defaults are SoFlow's on ImageNet."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["adamw", "radam", "adam"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr is {self.lr}; a learning rate above 0 is needed")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas are {self.betas}; each must be from 0 to below 1")

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer, in its fused form where there is one for this device."""
        settings: dict[str, Any] = {
            "lr": self.lr,
            "betas": self.betas,
            "weight_decay": self.weight_decay,
            "eps": self.eps,
        }
        if self.name == "radam":
            return torch.optim.RAdam(parameters, **settings, foreach=True)
        kind = torch.optim.AdamW if self.name == "adamw" else torch.optim.Adam
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
        return kind(parameters, **settings, fused=fused, foreach=None if fused else True)


@dataclass(frozen=True)
class StepRecord:
    """What one step did. A step that was refused (`finite` is False) changed nothing, and `culprit` names the
    term.
    """

    step: int
    """Finished steps, this one included if it was taken."""
    loss: float
    terms: dict[str, float]
    grad_norm: float
    """Of all gradients together, before clipping."""
    finite: bool = True
    culprit: str | None = None


class TrainStep:
    """Owns network, optimizer, EMAs and step count; a call makes one step.

    `precision` "auto" is mixed where bfloat16 is fast, on a GPU or a CPU with matrix units, and else float32.
    `network` may be wrapped in DistributedDataParallel, or `reduce_gradients` averages the gradients over the
    ranks in place; objectives with a Jacobian-vector product need the latter.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        optimizer: OptimizerConfig,
        total_steps: int,
        ema_decays: Sequence[float] = (0.9999,),
        precision: Precision | Literal["auto"] = "float32",
        clip_norm: float | None = None,
        compile: bool = False,
        reduce_gradients: Callable[[list[Tensor]], None] | None = None,
        power_ema_widths: Sequence[float] = (),
        deterministic: bool = False,
    ) -> None:
        wrapped = isinstance(network, DistributedDataParallel)
        if objective.uses_jvp and wrapped:
            raise ValueError(
                f"{objective.method} takes a Jacobian-vector product, which DistributedDataParallel has not;"
                " pass the plain network and reduce_gradients"
            )
        if objective.uses_jvp and compile:
            raise ValueError(
                f"{objective.method} takes a Jacobian-vector product; train it with compile=False"
            )
        self.network = network
        self.module = cast(nn.Module, network.module) if wrapped else network
        self.objective = objective
        self.total_steps = total_steps
        self.clip_norm = clip_norm
        self.reduce_gradients = reduce_gradients
        self.deterministic = deterministic
        self.step = 0
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(trained), list(trained.values())
        self.device = self.parameters[0].device
        if precision == "auto":
            precision = (
                "mixed" if self.device.type == "cuda" or _fast_bfloat16_cpu(self.device) else "float32"
            )
        self.optimizer = optimizer.build(self.parameters)
        teaches = objective.teacher_decay
        if teaches is not None and teaches not in ema_decays:
            ema_decays = (*ema_decays, teaches)
        self.ema = EMA(trained, ema_decays, power_ema_widths)
        self.policy = PassPolicy(
            precision,
            skip_unused=self.device.type == "cpu" and not compile,
            teacher=None if teaches is None else self._averaged(teaches),
        )
        if compile:
            self.module.compile(dynamic=False)

    def __call__(self, batch: Batch, draws: Draws) -> StepRecord:
        """One step on this rank's rows."""
        batch, draws = batch.to(self.device), draws.to(self.device)
        with _kernels(self.device, self.policy, self.deterministic):
            self.optimizer.zero_grad(set_to_none=True)
            result = self.objective.loss(self.network, batch, draws, self.step, self.total_steps, self.policy)
            values = torch.stack(
                [result.loss.detach(), *(term.detach() for term in result.terms.values())]
            ).float()
            # A seed of NaN makes every gradient NaN, on this rank and, after the reduction, on all of them.
            healthy = torch.isfinite(values).all()
            result.loss.backward(torch.where(healthy, 1.0, math.nan).to(result.loss.dtype))
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            if self.reduce_gradients is not None:
                self.reduce_gradients(gradients)
            norm = get_total_norm(gradients, foreach=True)
            if not torch.isfinite(norm):
                return self._refuse(result, values, norm)
            if self.clip_norm is not None:
                clip_grads_with_norm_(self.parameters, self.clip_norm, norm, foreach=True)
            self.optimizer.step()
            self.step += 1
            self.ema.update(self.parameters, self.step)
        return self._record(result, values, norm)

    def ema_state(self, decay: float | str | None = None) -> dict[str, Tensor]:
        """The network's state with the averaged parameters: of this decay, of an EMA's name, or of the first
        EMA.
        """
        name = Exponential(decay).name if isinstance(decay, float) else decay
        state: dict[str, Tensor] = dict(self.module.state_dict())
        return {**state, **self.ema.average(name)}

    def _averaged(self, decay: float) -> Network:
        """The network with the parameters of an EMA, whatever they are when it is called."""
        average = self.ema.average(Exponential(decay).name)

        def network(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
            return cast(Tensor, functional_call(self.module, average, (x, t, s, labels)))

        return network

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later TrainStep needs to go on as this one would."""
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "network": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state. Its total_steps must be the same, because schedules depend on it."""
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the state is of {state['total_steps']} total steps, this training of {self.total_steps};"
                " schedules depend on the total, so resume with the same"
            )
        self.module.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.step = state["step"]

    def _record(self, result: Loss, values: Tensor, norm: Tensor, culprit: str | None = None) -> StepRecord:
        loss, *terms = values.tolist()
        named = dict(zip(result.terms, terms, strict=True))
        return StepRecord(self.step, loss, named, float(norm), finite=culprit is None, culprit=culprit)

    def _refuse(self, result: Loss, values: Tensor, norm: Tensor) -> StepRecord:
        """No update: the first non-finite term is the culprit, then the loss, then a parameter's gradient."""
        loss, *terms = torch.isfinite(values).tolist()
        broken = [name for name, finite in zip(result.terms, terms, strict=True) if not finite]
        if broken or not loss:
            culprit = broken[0] if broken else "loss"
        else:
            pairs = zip(self.names, self.parameters, strict=True)
            bad = [name for name, p in pairs if p.grad is not None and not torch.isfinite(p.grad).all()]
            culprit = (
                f"gradient of {bad[0]}" if 0 < len(bad) < len(self.names) else "gradients of all parameters"
            )
        self.optimizer.zero_grad(set_to_none=True)
        return self._record(result, values, norm, culprit)


def _fast_bfloat16_cpu(device: torch.device) -> bool:
    """Whether this is a CPU with matrix units for bfloat16; others emulate it, slower than float32."""
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


@contextmanager
def _kernels(device: torch.device, policy: PassPolicy, deterministic: bool) -> Iterator[None]:
    """TF32 for the float32 passes of a reduced precision on a GPU, and deterministic kernels if asked; put
    back afterwards.
    """
    tf32 = device.type == "cuda" and policy.precision != "float32"
    matmul = torch.get_float32_matmul_precision()
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        if tf32:
            torch.set_float32_matmul_precision("high")
        if deterministic:
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
