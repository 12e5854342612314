"""Settings of the numbers that trials are compared by."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from soflow_platform.config.sections import Positive, Section


class EvaluationConfig(Section):
    """The numbers that trials are compared by: Fréchet distance on EMA samples against the training data."""

    every: Positive
    """Steps between evaluations; the last step is always evaluated."""
    samples: Annotated[int, Field(ge=16)] = 2048
    nfe: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2)
    """Numbers of function evaluations to score."""
    features: Literal["digits-classifier", "pooled"] = "pooled"
    """`digits-classifier`: a small network trained on the real digits. `pooled`: block averages of the training
    space itself, which needs no weights."""
    batch: Positive = 256
    labels: Literal["balanced", "uniform"] = "balanced"
    """Which labels samples get: every class equally often, or drawn (as the paper's FID is measured)."""
    grid: Annotated[int, Field(ge=1, le=16)] = 10
    """Rows and columns of the sample grid, drawn from the same noise at every evaluation."""
    seed: int = 0

    def metrics(self, conditional: bool) -> dict[str, Literal["min", "max"]]:
        """Names of the metrics an evaluation reports, with the direction that is better."""
        names: dict[str, Literal["min", "max"]] = {f"eval/fd_nfe{n}": "min" for n in self.nfe}
        if self.features == "digits-classifier" and conditional:
            names |= {f"eval/label_agreement_nfe{n}": "max" for n in self.nfe}
        return names
