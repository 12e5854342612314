"""Model of a training step on GPUs: its arithmetic, what ranks send each other, and how long both take (docs/scaling.md).

`soflowctl plan` and `benchmarks/scaling.py` compute with it. Times are in seconds, sizes in bytes, rates in bytes or FLOP per second. A
ring all-reduce of S bytes over n ranks sends 2 (n - 1) / n S from each; an all-gather or a reduce-scatter half of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from soflow_core.networks import Architecture
from soflow_core.nfe import LARGEST_COUNTED, NetworkCall, training_calls
from soflow_core.objectives import Objective
from soflow_core.passes import Precision
from soflow_platform.training.flops import forward_gmac

FLOAT = 4
BUCKET = 25 * 2**20
"""Gradients that DistributedDataParallel sends in one message."""
TAR_BLOCKS = 4 * 512
"""Of a sample in its shard: two headers for the array, header and block of the label."""
SAMPLE_BYTES = 2 * 4 * 32 * 32 * 2 + TAR_BLOCKS
"""Of a latent (4, 32, 32) in its shard: mean and std in float16."""
DECODER_FLOPS = 2 * 311.1e9
"""Stable Diffusion's decoder to 256 x 256, counted with torch's FlopCounterMode."""
INCEPTION_FLOPS = 2 * 5.71e9
"""Inception of one image."""
DIGITS_FLOPS = 2 * (9 * (1 * 32 * 64 + 32 * 64 * 64 + 64 * 64 * 16) + 64 * 16 * 64 + 64 * 10)
"""The classifier of the digits, of one image."""
HOST_COPY = 25e9
"""GPU to pinned host memory, bytes per second."""
FORWARD, BACKWARD, UPDATE = 8, 16, 40
"""Bytes of a parameter that move through memory whatever the batch: in a pass forwards (the weights and their bfloat16 copy),
backwards (weights and gradients), and in norm, AdamW and one average."""


@dataclass(frozen=True)
class Pass:
    """One call of the network in a training step."""

    rows: float
    """Share of the batch; above 1 where rows are run for two targets at once, and by a second head's share where both run."""
    gradient: bool
    bfloat16: bool
    tangent: bool = False
    """Whether it takes a Jacobian-vector product."""
    recomputed: bool = False
    """Whether it is made again in its backward pass."""

    @classmethod
    def of(cls, call: NetworkCall, batch: int, head_share: float = 0.0, recompute: bool = False) -> Pass:
        """A call in a step of `batch` rows; a second head's own layers are this share of a pass."""
        rows = call.rows / batch * (1 + (head_share if call.head == "both" else 0.0))
        return cls(rows, call.gradient, call.bfloat16, call.tangent, recompute and call.gradient)

    @property
    def forwards(self) -> float:
        """In forward passes of the batch: a backward pass counts two, a tangent one."""
        return self.rows * ((3 if self.gradient else 1) + self.tangent)

    @property
    def executed(self) -> float:
        """As `forwards`, with what is recomputed, and a tangent as torch computes it: with the zero tangents of weights too."""
        return self.forwards + self.rows * (self.tangent + self.recomputed)


@dataclass(frozen=True)
class Work:
    """A network and what a step of it is made of."""

    parameters: int
    """The trained ones."""
    forward_flops: float
    """Of one sample."""
    passes: list[Pass]

    @property
    def forwards(self) -> float:
        """Forward passes that a sample is worth."""
        return sum(p.forwards for p in self.passes)

    @property
    def executed(self) -> float:
        """Forward passes of a sample that torch computes."""
        return sum(p.executed for p in self.passes)

    @property
    def gradient_bytes(self) -> float:
        return float(FLOAT * self.parameters)


def work_of(
    network: Architecture,
    objective: Objective,
    precision: Precision,
    batch: int = 256,
    conditional: bool = True,
    recompute: bool = False,
) -> list[tuple[float, Work]]:
    """For each phase of a training: its share of the steps, and the work of a step; no row is left out, as on a GPU."""
    trained, flops = network.trained_parameters(), 2e9 * forward_gmac(network)
    share_of_head = network.second_head_flops() / flops if flops else 0.0
    counted = min(batch, LARGEST_COUNTED)
    return [
        (
            float(share),
            Work(trained, flops, [Pass.of(call, counted, share_of_head, recompute) for call in calls]),
        )
        for share, calls in training_calls(objective, counted, conditional, precision)
    ]


def stored_bytes(shape: tuple[int, ...], latents: bool) -> int:
    """Bytes of a sample (C, H, W) in its shard: a latent's mean and std in float16, or an image's pixels in a byte each."""
    return math.prod(shape) * (4 if latents else 1) + TAR_BLOCKS


def decoder_flops(shape: tuple[int, ...]) -> float:
    """FLOPs of Stable Diffusion's decoder for a latent (C, H, W); its convolutions are in proportion to the area."""
    return DECODER_FLOPS * shape[1] * shape[2] / 32**2


def feature_flops(features: str) -> float:
    """FLOPs of a feature network for one image; those that are not named here are small beside them or not counted."""
    return {
        "inception": INCEPTION_FLOPS,
        "dinov2": _vision_flops(257, 1024, 24, 14),
        "clip": _vision_flops(50, 768, 12, 32),
        "digits-classifier": DIGITS_FLOPS,
    }.get(features, 0.0)


def _vision_flops(tokens: int, width: int, depth: int, patch: int) -> float:
    """FLOPs of a vision transformer with one class token: blocks, and the embedding of RGB patches."""
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    return 2.0 * (depth * block + (tokens - 1) * 3 * patch**2 * width)


@dataclass(frozen=True)
class Device:
    """A GPU and the share of its peaks that a step reaches."""

    bfloat16: float = 989e12
    tf32: float = 495e12
    memory: float = 3.35e12
    utilization: float = 0.4
    memory_share: float = 0.8

    def forward(self, work: Work, p: Pass, rows: float) -> float:
        """Arithmetic of a pass over its share of `rows` samples; a backward pass takes twice as long."""
        peak = self.bfloat16 if p.bfloat16 else self.tf32
        return work.forward_flops * rows * p.rows / (peak * self.utilization)

    def arithmetic(self, work: Work, rows: float) -> float:
        """Of all passes of a step."""
        return sum(self.forward(work, p, rows) * p.executed / p.rows for p in work.passes if p.rows)

    def moving(self, work: Work, each: float) -> float:
        """`each` bytes for every parameter through memory."""
        return each * work.parameters / (self.memory * self.memory_share)


@dataclass(frozen=True)
class Fabric:
    """What joins GPUs: inside a node, and each node to the others."""

    name: str
    inside: float = 450e9
    """Of one GPU, in one direction."""
    between: float = 400e9
    """Of one node, in one direction."""
    node: int = 8
    share: float = 0.8
    """Of the line rates that is reached."""
    latency: float = 10e-6
    """Of one hop between nodes."""

    def gather(self, size: float, ranks: int) -> float:
        """An all-gather, or a reduce-scatter, of `size` bytes in all: between nodes, then inside."""
        local, nodes = min(ranks, self.node), -(-ranks // self.node)
        inside = (local - 1) / local * size / (self.inside * self.share)
        # Every GPU of a node fetches another share of what the other nodes hold.
        between = (nodes - 1) / nodes * size / (self.between * self.share)
        return inside + between + self._hops(nodes)

    def all_reduce(self, size: float, ranks: int) -> float:
        """Reduce-scatter inside a node, all-reduce of each share between nodes, all-gather inside."""
        local = min(ranks, self.node)
        inside = 2 * (local - 1) / local * size / (self.inside * self.share)
        return inside + self.all_reduce_between(size, ranks)

    def all_reduce_between(self, size: float, ranks: int) -> float:
        """Of `size` bytes that the GPUs of each node hold together."""
        nodes = -(-ranks // self.node)
        return 2 * (nodes - 1) / nodes * size / (self.between * self.share) + 2 * self._hops(nodes)

    def _hops(self, nodes: int) -> float:
        """Of one message through a tree of nodes; messages follow one another, so that only one waits."""
        return self.latency * math.ceil(math.log2(nodes)) if nodes > 1 else 0.0


@dataclass(frozen=True)
class Step:
    """Seconds of one step of one rank."""

    compute: float
    weights: float
    communication: float
    exposed: float
    """Of the communication, what nothing hides."""

    @property
    def total(self) -> float:
        return self.compute + self.weights + self.exposed

    @property
    def efficiency(self) -> float:
        """Share of the time that the step would also take without the others."""
        return 1 - self.exposed / self.total


def ddp_step(work: Work, device: Device, fabric: Fabric, ranks: int, batch: int) -> Step:
    """Every rank holds the network; gradients are sent bucket by bucket while the rest of the backward pass runs.

    Of several calls with gradient the first is the last to run backwards, and no parameter's gradient is complete before.
    """
    rows = batch / ranks
    weights = device.moving(work, UPDATE + sum(FORWARD + BACKWARD * p.gradient for p in work.passes))
    sending = fabric.all_reduce(work.gradient_bytes, ranks) if ranks > 1 else 0.0
    buckets = max(1.0, work.gradient_bytes / BUCKET)
    last = next(p for p in work.passes if p.gradient)
    hiding = 2 * device.forward(work, last, rows) + device.moving(work, BACKWARD)
    exposed = max(sending / buckets, sending - hiding * (1 - 1 / buckets))
    return Step(device.arithmetic(work, rows), weights, sending, exposed)


def fsdp_messages(work: Work) -> tuple[int, int]:
    """(all-gathers, reduce-scatters) of the whole network in a step: a gather for each call and each backward pass, and one
    reduce-scatter, for a gradient is complete after the last backward pass."""
    return len(work.passes) + sum(p.gradient for p in work.passes), 1


def fsdp_step(
    work: Work, device: Device, fabric: Fabric, ranks: int, batch: int, shards: int | None = None
) -> Step:
    """Each rank of a group of `shards` (default all) holds a share of the network; groups then average their gradients.

    While a block runs the next one is gathered, so that a pass takes as long as its work or its messages.
    """
    group, rows = shards or ranks, batch / ranks
    gather = fabric.gather(work.gradient_bytes, group)
    # The GPUs of a node each average their own share with their fellows of the other nodes.
    scatter = gather + (fabric.all_reduce_between(work.gradient_bytes, ranks) if group < ranks else 0.0)
    exposed = 0.0
    for p in work.passes:
        forward = device.forward(work, p, rows)
        exposed += max(0.0, gather - forward - device.moving(work, FORWARD))
        if p.gradient:
            first = p is next(q for q in work.passes if q.gradient)
            messages = gather + (scatter if first else 0.0)
            exposed += max(0.0, messages - 2 * forward - device.moving(work, BACKWARD))
    sent = fsdp_messages(work)[0] * gather + scatter
    weights = device.moving(work, UPDATE / group + sum(FORWARD + BACKWARD * p.gradient for p in work.passes))
    return Step(device.arithmetic(work, rows), weights, sent, exposed)
