"""Scores of generated images: streaming statistics that merge over workers, and the numbers taken of them."""

from soflow_pipelines.metrics.accumulator import METRICS, ScoreError, ScoreStatistics
from soflow_pipelines.metrics.fid import FeatureStatistics, GaussianMoments, frechet_distance
from soflow_pipelines.metrics.reference import Reference
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
