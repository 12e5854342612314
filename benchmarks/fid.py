"""What FID's statistics take beside the feature network, and its square root computed in two ways.

python benchmarks/fid.py [--dim 2048] [--rounds 3]

The network is torchvision's Inception v3 with random weights, on 299 x 299 pixels. CPU seconds of all threads for an image:
the network's, and that of adding its features (D,) to mean and covariance in float64. Then the seconds of one Fréchet
distance of two covariances, once by singular values of the product of their principal axes, as `frechet_distance` does, and
once by eigenvalues of the symmetric product, with the relative error of either where the distance is known: covariances
that share their eigenvectors, with variances over twelve orders of magnitude.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from soflow_pipelines.metrics.fid import FeatureStatistics, GaussianMoments, frechet_distance

Array = NDArray[np.float64]


def cpu_seconds(work: Callable[[], object], rounds: int) -> float:
    """Median CPU seconds of this process."""
    taken = []
    for _ in range(rounds):
        before = time.process_time()
        work()
        taken.append(time.process_time() - before)
    return statistics.median(taken)


def network_seconds(rounds: int) -> float:
    """CPU seconds of the network for one image."""
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, init_weights=False).eval()
    batch = torch.rand(8, 3, 299, 299)
    with torch.inference_mode():
        network(batch)
        return cpu_seconds(lambda: network(batch), rounds) / len(batch)


def covariance_seconds(dim: int, rounds: int) -> float:
    """CPU seconds of adding one image's features, in the blocks in which they are added."""
    features = torch.randn(2048, dim)
    found = FeatureStatistics(dim)
    found.update(features)
    return cpu_seconds(lambda: [found.update(part) for part in features.split(64)], rounds) / len(features)


def root_by_eigenvalues(a: GaussianMoments, b: GaussianMoments) -> float:
    """Trace of (A B)^1/2 by the eigenvalues of a^1/2 U^T B U a^1/2, negative ones taken as 0."""
    axes = a.principal_axes
    product: Array = axes.T @ b.covariance @ axes
    values = np.linalg.eigvalsh((product + product.T) / 2)
    return float(np.sqrt(values.clip(min=0)).sum())


def distance_by_eigenvalues(a: GaussianMoments, b: GaussianMoments) -> float:
    shift = a.mean - b.mean
    return float(
        shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_by_eigenvalues(a, b)
    )


def known_pair(dim: int) -> tuple[GaussianMoments, GaussianMoments, float]:
    """Two Gaussians with the same eigenvectors, and their distance: the sum of (sqrt a_i - sqrt b_i)^2."""
    rng = np.random.default_rng(0)
    vectors, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    a, b = (10.0 ** rng.uniform(-12, 0, dim) for _ in range(2))
    one, other = (GaussianMoments(np.zeros(dim), (vectors * values) @ vectors.T) for values in (a, b))
    return one, other, float(((np.sqrt(a) - np.sqrt(b)) ** 2).sum())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    network = network_seconds(arguments.rounds)
    covariance = covariance_seconds(arguments.dim, arguments.rounds)
    print(
        f"network {1000 * network:.1f} ms an image, mean and covariance of {arguments.dim} features "
        f"{1000 * covariance:.3f} ms: {covariance / network:.2%}"
    )
    one, other, exact = known_pair(arguments.dim)
    axes = cpu_seconds(lambda: GaussianMoments(one.mean, one.covariance).principal_axes, 1)
    _ = one.principal_axes, other.principal_axes
    for name, distance in (
        ("singular values", frechet_distance),
        ("eigenvalues", distance_by_eigenvalues),
    ):
        seconds = cpu_seconds(lambda distance=distance: distance(one, other), 1)
        error = abs(distance(one, other) / exact - 1)
        print(
            f"{name:>16}: {seconds:6.2f} s after {axes:.2f} s for the axes of each set, relative error {error:.1e}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
