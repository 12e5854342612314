"""Each method, trained from scratch on data with a known solution, finds it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from soflow_core.guidance import Guidance, VelocityGuidance
from soflow_core.objectives import (
    AlphaFlow,
    Batch,
    ContinuousConsistency,
    Diffusion,
    EasyConsistency,
    ExplicitShortcut,
    FlowMatching,
    ImprovedConsistency,
    ImprovedMeanFlow,
    MeanFlow,
    Objective,
    Shortcut,
    SoFlow,
    SoFlowTimes,
)
from soflow_core.optimizer import OptimizerConfig
from soflow_core.samplers.noise import sample_noise
from soflow_core.times import LogitNormal
from soflow_core.train_step import TrainStep, TrainStepConfig
from tests.support.gaussian import SHAPE, Gaussian

DATA = Gaussian(0.7, 0.5)
STEPS = 2500
# Wider than an image recipe's, which hardly reaches t = 1: a network this small does not extrapolate.
WIDE = SoFlowTimes(LogitNormal(0.0, 1.5), LogitNormal(1.0, 1.5), LogitNormal(-1.0, 1.5))
SOFLOW = SoFlow(flow_matching_share=0.25, weight_power=0.0, guidance=Guidance(scale=1), times=WIDE)


class AffineNetwork(nn.Module):
    """F = gain(t, s) x + offset(t, s), elementwise: the form of every exact solution for Gaussian data."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.body = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        del labels
        times = torch.stack([t, s, t - s], dim=1) * self.scale
        gain, offset = self.body(times).reshape(-1, 2, 1, 1, 1).unbind(1)
        return gain * x + offset


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "sampling_steps", "tolerance"),
    [
        (SOFLOW, 1, 0.05),
        (SOFLOW, 4, 0.05),
        (
            replace(SOFLOW, path="trigonometric", parameterization="trigonometric"),
            1,
            0.05,
        ),
        (MeanFlow(weight_power=0.0, time=LogitNormal(0.0, 1.5)), 1, 0.05),
        (MeanFlow(weight_power=0.0, time=LogitNormal(0.0, 1.5), derivative="finite_difference"), 1, 0.05),
        (ImprovedMeanFlow(weight_power=0.0, time=LogitNormal(0.0, 1.5)), 1, 0.05),
        (
            ExplicitShortcut(
                guidance=VelocityGuidance(), time=LogitNormal(0.0, 1.5), zero_steps=500, warmup_steps=500
            ),
            1,
            0.05,
        ),
        (AlphaFlow(guidance=VelocityGuidance(), time=LogitNormal(0.0, 1.5)), 1, 0.07),
        (ImprovedConsistency(), 1, 0.08),
        (EasyConsistency(huber=0.1), 1, 0.08),
        (ContinuousConsistency(warmup_steps=200), 1, 0.05),
        (Shortcut(bootstrap_share=0.25, teacher_ema=0.99), 1, 0.08),
        (FlowMatching(sampler="heun"), 32, 0.05),
        (Diffusion(), 100, 0.05),
    ],
    ids=lambda v: getattr(v, "method", str(v)),
)
def test_a_method_learns_the_gaussian(objective: Objective, sampling_steps: int, tolerance: float) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = AffineNetwork(1e-3 if isinstance(objective, Diffusion) else 1.0)
    config = TrainStepConfig(STEPS, OptimizerConfig(lr=2e-3), ema_decays=(0.99,), clip_norm=1.0)
    train = TrainStep(network, objective, config)
    for _ in range(STEPS):
        x0 = DATA.mean + DATA.std * torch.randn(256, *SHAPE, generator=generator)
        assert train(Batch(x0), objective.draw(generator, 256, SHAPE, conditional=False)).finite
    network.load_state_dict(train.ema_state())
    noise = [sample_noise(1, range(5000), SHAPE, draw) for draw in range(sampling_steps)]
    with torch.no_grad():
        samples = objective.sample(network, noise[0], None, sampling_steps, noise[1:])
    assert samples.mean().item() == pytest.approx(DATA.mean, abs=tolerance)
    assert samples.std().item() == pytest.approx(DATA.std, abs=tolerance)
