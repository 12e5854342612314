"""Networks as sampling runs them: recorded ones make the samples of the network itself, bfloat16 ones are near them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_core.conformance.test_objective import CLASSES, SHAPE, network_for
from soflow_core.guidance import Guidance, ScaleRange
from soflow_core.objectives import OBJECTIVES, Objective, SoFlow
from soflow_core.recorded_passes import WARM_UP, Work
from soflow_core.sampling_networks import Bfloat16Network, RecordedNetwork, SamplingNetwork
from soflow_core.sharding import compile_blocks
from tests.support.recorded_operations import OperationRecorder

ROWS, BATCHES = 6, 3
WAYS: dict[str, tuple[Objective, int]] = {
    "solution, 1 step": (SoFlow(), 1),
    "solution, 2 steps": (SoFlow(), 2),
    "solution, 2 steps of a trajectory": (SoFlow(sampler="ode"), 2),
    "solution at a scale": (SoFlow(guidance=Guidance(scale=ScaleRange(1.0, 4.0)), sampling_scale=2.0), 2),
    "euler": (OBJECTIVES["flow_matching"](), 3),
    "heun": (OBJECTIVES["flow_matching"](sampler="heun"), 2),
    "guided heun": (OBJECTIVES["flow_matching"](sampler="heun", sampling_scale=2.0, drop=0.1), 2),
    "ddim": (OBJECTIVES["diffusion"](sampler="ddim"), 4),
    "guided ddpm": (OBJECTIVES["diffusion"](sampler="ddpm", sampling_scale=1.5, drop=0.1), 3),
}
WAYS |= {f"{name}, 2 steps": (kind(), 2) for name, kind in OBJECTIVES.items()}
"""How a method is sampled, and in how many steps."""


def batches(conditional: bool = True, rows: int = ROWS) -> Iterator[dict[str, Any]]:
    """Arguments of `sample` for one batch after the other."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(BATCHES):
        noise, *renoise = torch.randn(4, rows, *SHAPE, generator=generator)
        labels = torch.randint(CLASSES, (rows,), generator=generator) if conditional else None
        yield {"noise": noise, "labels": labels, "renoise": renoise}


@torch.inference_mode()
def samples(
    objective: Objective, network: SamplingNetwork, steps: int, conditional: bool = True
) -> list[Tensor]:
    return [
        objective.sample(network, steps=steps, **inputs)  # type: ignore[arg-type]
        for inputs in batches(conditional)
    ]


@pytest.mark.parametrize("wrapped", [lambda network: network, Bfloat16Network], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_samples_of_a_recorded_network_are_those_of_the_network_bit_for_bit(
    way: str, wrapped: Callable[[SamplingNetwork], SamplingNetwork]
) -> None:
    objective, steps = WAYS[way]
    network, recorder = wrapped(network_for(objective)), OperationRecorder()
    recorded = RecordedNetwork(network, recorder)
    pairs = zip(samples(objective, recorded, steps), samples(objective, network, steps), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert recorder.recorded == 1
    assert recorder.replayed >= BATCHES


def test_a_network_without_labels_is_recorded() -> None:
    objective, recorder = SoFlow(), OperationRecorder()
    network = network_for(objective, conditional=False)
    recorded = samples(objective, RecordedNetwork(network, recorder), 2, conditional=False)
    plain = samples(objective, network, 2, conditional=False)
    assert all(torch.equal(one, other) for one, other in zip(recorded, plain, strict=True))
    assert recorder.recorded == 1


def test_each_shape_has_a_recording_which_is_kept() -> None:
    objective, recorder = SoFlow(), OperationRecorder()
    network = network_for(objective)
    recorded = RecordedNetwork(network, recorder)
    for rows in (4, 6, 4, 6):
        for inputs in batches(rows=rows):
            one, other = (objective.sample(each, steps=1, **inputs) for each in (recorded, network))
            assert torch.equal(one, other)
    assert recorder.recorded == 2
    assert recorder.replayed == 4 * BATCHES


def test_what_a_replay_returned_is_not_changed_by_the_next() -> None:
    objective = SoFlow()
    network = network_for(objective)
    recorded, given = RecordedNetwork(network, OperationRecorder()), []
    for inputs in batches():
        x, t, labels = inputs["noise"], torch.full((ROWS,), 0.7), inputs["labels"]
        given.append((recorded(x, t, t, labels), network(x, t, t, labels)))
    assert all(torch.equal(one, other) for one, other in given)


def test_a_recording_of_inference_mode_serves_outside_of_it() -> None:
    objective = SoFlow()
    network = network_for(objective)
    recorded = RecordedNetwork(network, OperationRecorder())
    inside = samples(objective, recorded, 1)
    outside = [objective.sample(recorded, steps=1, **inputs) for inputs in batches()]
    assert all(torch.equal(one, other) for one, other in zip(inside, outside, strict=True))
    assert not any(each.is_inference() for each in outside)


def test_a_bfloat16_network_takes_and_gives_float32_near_that_of_float32() -> None:
    objective = SoFlow()
    network = network_for(objective)
    pairs = zip(samples(objective, Bfloat16Network(network), 2), samples(objective, network, 2), strict=True)
    for low, full in pairs:
        assert low.dtype == torch.float32
        assert not torch.equal(low, full)
        # bfloat16 has 8 bits; the two passes amplify little.
        assert_close(low, full, rtol=0, atol=0.03 * float(full.abs().max()))
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_a_network_that_is_run_otherwise_has_the_architecture_of_the_network() -> None:
    network = network_for(SoFlow())
    assert RecordedNetwork(Bfloat16Network(network), OperationRecorder()).config is network.config


@pytest.mark.slow
def test_compiled_blocks_are_compiled_in_the_first_pass_alone() -> None:
    """A recording may not hold the work of a compiler."""
    objective = SoFlow()
    plain, compiled = network_for(objective), network_for(objective)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled)
    counts = []

    class Passes(OperationRecorder):
        """Makes the pass in place of recording it: the recorder of a CPU sees no operation of a compiled kernel."""

        def warm_up(self, work: Work) -> None:
            work()
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

        def record(self, work: Work) -> Work:
            self.warm_up(work)
            return lambda: None

    inputs = next(batches())
    with torch.inference_mode():
        recorded, expected = (
            objective.sample(network, steps=1, **inputs)
            for network in (RecordedNetwork(compiled, Passes()), plain)
        )
    assert_close(recorded, expected, rtol=1e-4, atol=1e-4)
    assert len(counts) == WARM_UP + 1
    assert counts[0] > 0
    assert len(set(counts)) == 1, counts
