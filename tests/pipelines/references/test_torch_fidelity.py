"""The whole way from image files to scores, beside torch-fidelity's on the same files and weights in the same run.

The weights are random, for the published ones cannot be shipped: what is compared is everything but their values.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_fidelity import calculate_metrics

from soflow_pipelines.features import open_features
from soflow_pipelines.images.encode import write_folder
from soflow_pipelines.metrics import ScoreStatistics, scores
from soflow_pipelines.metrics.reservoir import splitmix64
from soflow_pipelines.references.image_sets import batches, open_image_set
from soflow_pipelines.references.reference_statistics import reference_from_set
from tests.support.random_weights import save_inception

METRICS = ("fid", "is", "kid", "precision", "recall")


def pictures(count: int, contrast: float, seed: int) -> np.ndarray:
    """Blocks of colour under noise, (N, 3, 32, 32)."""
    rng = np.random.default_rng(seed)
    blocks = rng.normal(128, contrast, (count, 3, 4, 4)).repeat(8, 2).repeat(8, 3)
    return np.clip(blocks + rng.normal(0, 20, blocks.shape), 0, 255).astype(np.uint8)


@pytest.mark.slow
def test_scores_are_torch_fidelitys_on_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated, real = tmp_path / "generated", tmp_path / "real"
    write_folder(pictures(26, 60, 1), generated)
    write_folder(pictures(20, 50, 2), real)
    weights = save_inception(tmp_path / "inception.pth")
    usual: dict[str, Any] = {
        "feature_extractor": "inception-v3-compat",
        "samples_shuffle": False,
        "feature_extractor_weights_path": str(weights),
        "cuda": False,
        "cache": False,
        "save_cpu_ram": True,
        "verbose": False,
    }
    theirs = calculate_metrics(
        input1=str(generated), input2=str(real), fid=True, kid=True, prc=True, kid_subset_size=20, **usual
    )
    # Splits of the Inception Score are made in the order of the fixed permutation; theirs in that of the files.
    write_folder(pictures(26, 60, 1)[np.argsort(splitmix64(np.arange(26)))], tmp_path / "permuted")
    theirs |= calculate_metrics(input1=str(tmp_path / "permuted"), isc=True, **usual)

    monkeypatch.setenv("SOFLOW_INCEPTION_WEIGHTS", str(weights))
    network = open_features("inception", tmp_path)
    reference = reference_from_set(open_image_set(real), network, METRICS)
    images = open_image_set(generated)
    statistics = ScoreStatistics(network, METRICS, samples=len(images))
    start = 0
    for batch in batches(images, 8):
        statistics.update(torch.arange(start, start + len(batch)), batch)
        start += len(batch)
    ours = scores(statistics, reference)

    assert theirs["frechet_inception_distance"] > 1
    assert ours.values["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)
    assert ours.values["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours.spread["is"] == pytest.approx(theirs["inception_score_std"], rel=1e-4)
    assert ours.values["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours.spread["kid"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)
    assert ours.values["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours.values["recall"] == pytest.approx(theirs["recall"], abs=1e-6)
