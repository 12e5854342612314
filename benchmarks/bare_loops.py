"""Training loops without TrainStep, as one writes them for a paper, on its network, batch and draws: what its step is compared with.

- `plain`: forward, squared error, backward, AdamW; no average. bfloat16 under autocast on a GPU.
- `bare loop`: SiT's Flow Matching with label dropping, AdamW, one average. bfloat16 under autocast on a GPU.
- `official's way`: SoFlow as the official code is arranged: a call of the network for each term, not compiled, everything float32
  with TF32, attention by the memory-efficient kernel, AdamW, one average.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from soflow_core.guidance import drop_labels
from soflow_core.kernels import tf32
from soflow_core.objectives import Batch, Draws, SoFlow
from soflow_six_calls import six_call_loss

PLAIN, FLOW_MATCHING, OFFICIAL = "plain", "bare loop", "official's way"
LOOPS = (PLAIN, FLOW_MATCHING, OFFICIAL)
DECAY = 0.9999


class BareLoop:
    """A network with its optimizer and average; a call makes one step, and waits for its loss as a loop that logs does.

    Its draws are those of SoFlow for `official's way`, and of Flow Matching for the others.
    """

    def __init__(self, name: str, network: nn.Module, total_steps: int) -> None:
        self.name, self.network, self.total_steps, self.step = name, network, total_steps, 0
        self.soflow = SoFlow()
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.on_gpu = self.parameters[0].device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=self.on_gpu)
        self.average = [] if name == PLAIN else [p.detach().clone() for p in self.parameters]
        losses: dict[str, Callable[[Batch, Draws], Tensor]] = {
            PLAIN: self._plain,
            FLOW_MATCHING: self._flow_matching,
            OFFICIAL: self._official,
        }
        self.loss = losses[name]

    def __call__(self, batch: Batch, draws: Draws) -> float:
        with self._kernels():
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(batch, draws)
            loss.backward()
            self.optimizer.step()
            if self.average:
                with torch.no_grad():
                    torch._foreach_lerp_(self.average, self.parameters, 1 - DECAY)
        self.step += 1
        return loss.item()

    def _kernels(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        if self.on_gpu:
            stack.enter_context(tf32(True))
            if self.name == OFFICIAL:
                stack.enter_context(sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION))
        return stack

    def _plain(self, batch: Batch, draws: Draws) -> Tensor:
        return (self._half(batch.x0, draws.t, batch.labels) - batch.x0).square().mean()

    def _flow_matching(self, batch: Batch, draws: Draws) -> Tensor:
        assert batch.labels is not None
        assert draws.dropped is not None
        t = draws.t[:, None, None, None]
        x_t = (1 - t) * batch.x0 + t * draws.noise
        prediction = self._half(x_t, draws.t, drop_labels(batch.labels, draws.dropped))
        return (prediction - (draws.noise - batch.x0)).square().mean()

    def _official(self, batch: Batch, draws: Draws) -> Tensor:
        return six_call_loss(self.soflow, self.network, batch, draws, self.step, self.total_steps)

    def _half(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """A pass in bfloat16 where TrainStep's `auto` takes it for Flow Matching on a GPU; in float32 on a CPU."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.on_gpu):
            found: Tensor = self.network(x, t, t, labels)
        return found.float()
