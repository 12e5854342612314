"""Reference values computed with the official SoFlow implementation (float32, CPU)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from soflow_core.guidance import Guidance
from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import Batch, Draws, SoFlow
from soflow_core.times import RatioSchedule

CASES = [
    "imagenet",
    "no_mix",
    "no_guidance",
    "unconditional",
    "trig_path",
    "trig_param",
    "trig_both",
    "l2_weight",
]
SCHEDULES = {"Const": "constant", "Linear": "linear", "Cosine": "cosine", "Exponent": "exponential"}
PATHS = {"Linear": "linear", "Trig": "trigonometric"}
PARAMETERIZATIONS = {"Euler": "euler", "Trig": "trigonometric"}
CONFIG = DiTConfig(
    channels=4, height=8, width=8, patch=2, hidden=32, depth=2, heads=2, classes=10, null_label=True
)


@dataclass
class Case:
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    objective: SoFlow
    network: DiT

    @property
    def labels(self) -> Tensor | None:
        return self.tensors.get("labels")

    @property
    def batch(self) -> Batch:
        return Batch(self.tensors["x0"], self.labels)

    def velocity_draws(self) -> Draws:
        """Draws that put the whole batch into the Flow Matching branch."""
        t = self.tensors["t_velocity"]
        return Draws(self.tensors["x1"], t, t, self.tensors.get("drop_mask"), velocity_rows=len(t))

    def consistency_draws(self) -> Draws:
        """Draws that put the whole batch into the consistency branch."""
        tensors = self.tensors
        return Draws(tensors["x1"], tensors["t"], tensors["s"], tensors.get("drop_mask"), velocity_rows=0)

    def gradients(self, branch: str) -> dict[str, Tensor]:
        prefix = f"{branch}_grad/network."
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def load_case(name: str, all_settings: dict[str, Any], all_tensors: dict[str, Tensor]) -> Case:
    settings = all_settings[name]
    tensors = {k.removeprefix(f"{name}/"): v for k, v in all_tensors.items() if k.startswith(f"{name}/")}
    objective = SoFlow(
        weight_power=settings["p"],
        weight_eps=settings["eps"],
        path=PATHS[settings["path"]],
        parameterization=PARAMETERIZATIONS[settings["param"]],
        guidance=Guidance(settings["w"], settings["mix"], drop=0.1, decay_from=settings["decay"]),
        schedule=RatioSchedule(SCHEDULES[settings["sched"]], settings["r0"], settings["r1"]),
    )
    network = DiT(CONFIG)
    prefix = "weights/network."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return Case(settings, tensors, objective, network)
