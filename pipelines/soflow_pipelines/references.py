"""Reference statistics: of any images, of a folder, of ADM's reference batches, of a shard set; kept by what they are of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from soflow_pipelines.features.network import FeatureNetwork
from soflow_pipelines.metrics.reference import Reference
from soflow_pipelines.metrics.score_statistics import METRICS, RESERVOIR, ScoreError, ScoreStatistics


def reference_from_images(
    images: Iterable[Tensor],
    network: FeatureNetwork,
    metrics: Iterable[str],
    name: str,
    reservoir: int = RESERVOIR,
) -> Reference:
    """Statistics of batches of images (B, C, H, W), for the metrics that compare with a reference.

    ScoreError where there are none, where their sizes differ or a value is not finite.
    """
    compared = [metric for metric in metrics if metric not in METRICS or METRICS[metric].compares]
    statistics = ScoreStatistics(network, compared, reservoir=reservoir)
    for batch in images:
        start = statistics.count
        statistics.update(torch.arange(start, start + len(batch)), batch)
    if not statistics.count:
        raise ScoreError(f"the reference {name} holds no images.")
    return Reference.of(statistics, name)
