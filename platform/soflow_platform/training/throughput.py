"""Training speed of a trial: images per second, FLOPs and utilization, time spent waiting for data, time left, memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

DENSE_BFLOAT16 = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "L4": 121e12,
}  # fmt: skip
"""Dense bfloat16 peak in FLOP/s, by a word of the GPU's name; utilization is relative to it."""


@dataclass
class Throughput:
    """Measures the durations of one rank's steps over a window; `take` returns its rates and starts a new window."""

    batch: int
    total_steps: int
    flops_per_image: float
    """FLOPs of training on one image: all forward and backward passes of the method."""
    device: torch.device
    world: int
    _steps: int = 0
    _seconds: float = 0.0
    _waited: float = 0.0
    _began: float = 0.0
    _started: float = field(default_factory=time.monotonic)
    _first_step: int | None = None

    def begin(self) -> None:
        """Mark the start of a step, which begins by waiting for data."""
        self._began = time.perf_counter()

    def loaded(self) -> None:
        """Mark the end of the wait for data."""
        self._waited += time.perf_counter() - self._began

    def end(self, step: int) -> None:
        """Mark the end of a step."""
        self._seconds += time.perf_counter() - self._began
        self._steps += 1
        if self._first_step is None:
            self._first_step = step - 1

    @property
    def images_per_second(self) -> float:
        """Images per second in the present window, without the time of evaluations and checkpoints."""
        return self.batch * self._steps / self._seconds if self._seconds else 0.0

    def eta_seconds(self, step: int) -> float | None:
        """Estimated seconds to the last step, with evaluations and checkpoints; None before the second step."""
        done = step - (self._first_step or 0)
        if done < 2:
            return None
        return (time.monotonic() - self._started) / done * (self.total_steps - step)

    def take(self, step: int) -> dict[str, float]:
        """The window's metrics by name. Starts a new window."""
        rate = self.images_per_second
        numbers = {
            "system/images_per_second": rate,
            "system/step_seconds": self._seconds / max(1, self._steps),
            "system/data_wait_share": self._waited / self._seconds if self._seconds else 0.0,
            "system/images_seen": float(step * self.batch),
            "system/peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        left = self.eta_seconds(step)
        if left is not None:
            numbers["system/hours_left"] = left / 3600
        achieved = rate * self.flops_per_image / self.world
        numbers["system/tflops_per_worker"] = achieved / 1e12
        peak = peak_flops(self.device)
        if peak is not None:
            numbers["system/flops_utilization"] = achieved / peak
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        return numbers


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of a GPU in FLOP/s; None for a CPU or a GPU not listed."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((flops for word, flops in DENSE_BFLOAT16.items() if word in words), None)


def peak_memory(device: torch.device) -> float:
    """Peak memory so far in bytes: of tensors on the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii").split()
        return 1024.0 * int(status[status.index("VmHWM:") + 1])
    except (OSError, ValueError):
        import psutil

        return float(psutil.Process().memory_info().rss)
