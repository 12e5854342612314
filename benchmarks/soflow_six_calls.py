"""SoFlow's loss as the formulas are read: each branch by itself, six calls of the network, no row left out.

The measure of what soflow_core.objectives.soflow saves, and an independent form of the same numbers. Each call has
the precision of its kind: guidance and Flow Matching in low precision, the consistency pair in high precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soflow_core.guidance import decay, drop_labels
from soflow_core.objectives import Batch, Draws, SoFlow
from soflow_core.parameterization import PARAMETERIZATIONS
from soflow_core.passes import Network, Passes, PassPolicy
from soflow_core.paths import PATHS
from soflow_core.times import middle_time

FLOAT32 = PassPolicy()


def six_call_loss(
    objective: SoFlow,
    network: Network,
    batch: Batch,
    draws: Draws,
    step: int,
    total_steps: int,
    policy: PassPolicy = FLOAT32,
) -> Tensor:
    """The scalar to differentiate: L_v B_v / B + L_c (B - B_v) / B."""
    n = draws.velocity_rows
    labels = batch.labels
    dropped = draws.dropped
    head = velocity_loss(
        objective,
        network,
        batch.x0[:n],
        draws.noise[:n],
        draws.t[:n],
        None if labels is None else labels[:n],
        None if dropped is None else dropped[:n],
        policy,
    )
    ratio = objective.schedule.ratio(step, total_steps)
    tail = consistency_loss(
        objective,
        network,
        batch.x0[n:],
        draws.noise[n:],
        (draws.t[n:], middle_time(draws.t[n:], draws.s[n:], ratio), draws.s[n:]),
        None if labels is None else labels[n:],
        None if dropped is None else dropped[n:],
        policy,
    )
    return (head.sum() + tail.sum()) / len(draws.t)


def velocity_loss(
    objective: SoFlow,
    network: Network,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    labels: Tensor | None,
    dropped: Tensor | None,
    policy: PassPolicy = FLOAT32,
) -> Tensor:
    """(B,): the Flow Matching branch; two calls."""
    passes, column = Passes(network, policy), t[:, None, None, None]
    point, coefficients = (
        PATHS.named(objective.path)(t),
        PARAMETERIZATIONS.named(objective.parameterization)(t, t),
    )
    x_t, target = point.state(x0, x1), point.velocity(x0, x1)
    guidance = objective.guidance
    if labels is not None and guidance.active:
        assert dropped is not None
        mask = dropped[:, None, None, None]
        v_p = coefficients.velocity(x_t, passes.low_precision(x_t, t, t, drop_labels(labels, dropped)))
        with torch.no_grad():
            v_u = coefficients.velocity(x_t, passes.low_precision(x_t, t, t, None))
            guided = target + decay(column, guidance.decay_from) * (guidance.scale - 1) * (target - v_u)
            target = torch.where(mask, target, guidance.mix * guided + (1 - guidance.mix) * v_p)
    else:
        v_p = coefficients.velocity(x_t, passes.low_precision(x_t, t, t, labels))
    mse = (v_p - target).square().mean(dim=(1, 2, 3))
    weight = 1 / (coefficients.db_ds.abs() * (mse.detach() + objective.weight_eps) ** objective.weight_power)
    return weight * mse


def consistency_loss(
    objective: SoFlow,
    network: Network,
    x0: Tensor,
    x1: Tensor,
    times: tuple[Tensor, Tensor, Tensor],
    labels: Tensor | None,
    dropped: Tensor | None,
    policy: PassPolicy = FLOAT32,
) -> Tensor:
    """(B,): the solution consistency branch; four calls."""
    passes = Passes(network, policy)
    t, l, s = times  # noqa: E741
    parameterization = PARAMETERIZATIONS.named(objective.parameterization)
    point = PATHS.named(objective.path)(t)
    x_t, velocity = point.state(x0, x1), point.velocity(x0, x1)
    guidance = objective.guidance
    seen = labels
    if labels is not None and guidance.active:
        assert dropped is not None
        seen = drop_labels(labels, dropped)
        at_t = parameterization(t, t)
        strength = decay(t, guidance.decay_from)[:, None, None, None] * (guidance.scale - 1)
        with torch.no_grad():
            v_u = at_t.velocity(x_t, passes.low_precision(x_t, t, t, None))
            guided = velocity + strength * (velocity - v_u)
            if guidance.mix != 1:
                v_p = at_t.velocity(x_t, passes.low_precision(x_t, t, t, labels))
                guided = guidance.mix * guided + (1 - guidance.mix) * v_p
            velocity = torch.where(dropped[:, None, None, None], velocity, guided)
    start, middle = parameterization(t, s), parameterization(l, s)
    prediction = passes.high_precision(x_t, t, s, seen)
    with torch.no_grad():
        x_l = x_t + velocity * (l - t)[:, None, None, None]
        f_l = middle.solution(x_l, passes.high_precision(x_l, l, s, seen))
        quotient = (start.solution(x_t, prediction) - f_l) / (t - l)[:, None, None, None]
        weight = 1 / (quotient.square().mean(dim=(1, 2, 3)) + objective.weight_eps) ** objective.weight_power
    inner = (prediction * quotient * weight[:, None, None, None]).mean(dim=(1, 2, 3))
    return torch.sign(start.b) * inner
