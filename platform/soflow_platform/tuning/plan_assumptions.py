"""What a plan is computed for: the GPU, how much of its peak a step is taken to reach, and its price."""

from __future__ import annotations

from dataclasses import dataclass

from soflow_platform.errors import UserError
from soflow_platform.training.step_time import Device


@dataclass(frozen=True)
class Gpu:
    """A GPU: its peaks without sparsity, its memory, and what an hour of it is taken to cost."""

    bfloat16: float
    """FLOP per second."""
    tf32: float
    bandwidth: float
    """Bytes per second to its memory."""
    memory: float
    """Bytes."""
    price: float
    """USD an hour: a round number of cloud offers, which differ by a factor of three; `--price` gives another."""


GPUS = {
    "a100": Gpu(312e12, 156e12, 2.04e12, 80e9, 1.5),
    "h100": Gpu(989e12, 495e12, 3.35e12, 80e9, 2.5),
    "h200": Gpu(989e12, 495e12, 4.8e12, 141e9, 3.5),
    "b200": Gpu(2250e12, 1125e12, 7.7e12, 180e9, 5.0),
    "l40s": Gpu(362e12, 183e12, 0.864e12, 48e9, 1.0),
}
"""By the names that `--gpu` takes; peaks, bandwidth and memory are the makers'."""
USUAL_GPU = "h100"
UTILIZATION = 0.4
"""Share of a peak that a step is taken to reach."""
RESERVE = 0.9
"""Share of a GPU's memory that tensors can fill; the rest is the allocator's, the libraries' and for messages."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan is computed for."""

    gpu: str = USUAL_GPU
    gpus: int | None = None
    """GPUs of the cluster; None: those that one trial asks for."""
    utilization: float = UTILIZATION
    price: float | None = None
    """Of one GPU for an hour; None: that of `GPUS`."""
    currency: str = "USD"

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError(f"--gpu {self.gpu} is not known: name one of {', '.join(GPUS)}.")
        if not 0 < self.utilization <= 1:
            raise UserError(f"--utilization is {self.utilization:g}: give a share above 0 and at most 1.")

    @property
    def device(self) -> Device:
        """The GPU in the model of a step."""
        gpu = GPUS[self.gpu]
        return Device(gpu.bfloat16, gpu.tf32, gpu.bandwidth, self.utilization)

    @property
    def hour(self) -> float:
        """Price of a GPU for an hour."""
        return GPUS[self.gpu].price if self.price is None else self.price
