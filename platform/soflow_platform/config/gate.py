"""Settings of `registry`: the registered model, and the gate before its champion."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from soflow_platform.config.evaluation import known_features, known_metric
from soflow_platform.config.sections import Section, Seed

MODEL_NAME = re.compile(r"\w[\w. -]{0,198}\w|\w")
"""MLflow refuses / and : and what reads as a path; names with other signs do not go through its URIs and filters."""
MetricName = Annotated[str, AfterValidator(known_metric)]
FIRST_SEED = 1000
"""Far from the seeds of evaluations during training, by whose noise a trial was chosen."""


class GuardConfig(Section):
    """A second metric, in which the candidate must not be worse than the champion."""

    metric: MetricName
    features: str | None = None
    """Feature network; None: that of the gate."""
    tolerance: Annotated[float, Field(ge=0)] = 0.05
    """Part of the champion's value by which the candidate may be worse."""
    limit: float | None = None
    """Value that the candidate must reach whatever the champion has, a first champion too; None: there is none."""

    @field_validator("features")
    @classmethod
    def _known_features(cls, name: str | None) -> str | None:
        return name if name is None else known_features(name)


class GateConfig(Section):
    """The protocol under which a candidate and the champion are scored, and what decides between them."""

    metric: MetricName | None = None
    """The metric that decides; None: that of `search.metric`."""
    features: str | None = None
    """Feature network; None: that of `search.metric`, or `evaluation.features` where `metric` is set."""
    samples: Annotated[int, Field(ge=16, le=10**8)] | None = None
    """Samples for each seed; None: `evaluation.samples`, of the two sweeps the larger one."""
    seeds: Annotated[int, Field(ge=2, le=100)] = 5
    """Seeds under which both are scored; the noise of the metric is estimated from them."""
    first_seed: Seed = FIRST_SEED
    """The first of them; the others follow it."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Probability with which a candidate that is no better is refused."""
    reference: str | None = None
    """Real images; None: the candidate's training data."""
    guards: Annotated[tuple[GuardConfig, ...], Field(max_length=16)] | None = None
    """None: precision, recall and label agreement on the gate's features, as far as those give them."""

    @field_validator("features")
    @classmethod
    def _known_features(cls, name: str | None) -> str | None:
        return name if name is None else known_features(name)


class RegistryConfig(Section):
    """Where the best trial's EMA weights are registered, and what makes a version champion."""

    model: str | None = None
    """Registered model; None: the sweep's name."""
    enabled: bool = True
    gate: GateConfig = GateConfig()

    @field_validator("model")
    @classmethod
    def _known_model_name(cls, name: str | None) -> str | None:
        return name if name is None else model_name(name)


def model_name(name: str) -> str:
    """A name that MLflow takes for a registered model. Raises ValueError for any other."""
    if not MODEL_NAME.fullmatch(name):
        raise ValueError(
            "a registered model's name has letters, digits, spaces and . _ - (not / or :), begins with a letter or digit, "
            "and has at most 200 characters"
        )
    return name
