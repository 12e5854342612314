"""Scores of generated images, from streaming statistics that merge over workers.

accumulators      streaming statistics by kind: moments, spatial moments, class sums, reservoir, label agreement
fid               Fréchet distance, feature moments
inception_score   Inception Score
kid               Kernel Inception Distance
label_agreement   how often a classifier predicts the label that a sample was generated for
precision_recall  improved precision and recall
reference         statistics of the real images that samples are scored against
named             the metrics of the platform
registry          interface of a metric; the metrics by name
reservoir         fixed-size subset of samples that does not depend on their order
score_statistics  statistics of a set of images for a choice of metrics
scores            scores from statistics; one that would mislead is refused or flagged
version           version of the evaluator
"""

from soflow_pipelines.metrics import named  # noqa: F401 - registers them
from soflow_pipelines.metrics.accumulators import ScoreError
from soflow_pipelines.metrics.fid import FeatureStatistics, GaussianMoments, frechet_distance
from soflow_pipelines.metrics.reference import Reference
from soflow_pipelines.metrics.registry import METRICS
from soflow_pipelines.metrics.score_statistics import ScoreStatistics
from soflow_pipelines.metrics.scores import ScoreResult, scores
from soflow_pipelines.metrics.version import EVALUATOR

__all__ = [
    "EVALUATOR",
    "METRICS",
    "FeatureStatistics",
    "GaussianMoments",
    "Reference",
    "ScoreError",
    "ScoreResult",
    "ScoreStatistics",
    "frechet_distance",
    "scores",
]
