"""Settings of `evaluation`: the scores during training, which trials are compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from soflow_pipelines.features.registry import FEATURES
from soflow_pipelines.metrics.registry import METRICS
from soflow_platform.config.locations import FILE, absolute_autoencoder, absolute_features
from soflow_platform.config.sections import Positive, Samples, Section, Seed, Steps

POOLED = "pooled"
DIGITS = "digits-classifier"


def known_features(name: str) -> str:
    """The name of a feature network, a file's path made absolute. Raises ValueError for an unknown name."""
    if name not in FEATURES and not (name.startswith(FILE) and name != FILE):
        raise ValueError(f"known are {', '.join(FEATURES)} and {FILE}PATH")
    return absolute_features(name)


def known_metric(name: str) -> str:
    """The name of a metric. Raises ValueError for one that is not registered."""
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(METRICS)}")
    return name


class EvaluationConfig(Section):
    """The numbers that trials are compared by: Fréchet distance on EMA samples against the training data."""

    every: Positive
    """Steps between evaluations; the last step is always evaluated."""
    samples: Annotated[int, Field(ge=16, le=10**8)] = 2048
    metrics: Annotated[tuple[str, ...], Field(max_length=32)] = ()
    """Metrics beside the Fréchet distance, such as `kid`, `precision` or one of a plugin. Digits have label agreement anyway."""
    nfe: Annotated[tuple[Steps, ...], Field(min_length=1, max_length=16)] = (1, 2)
    """Numbers of function evaluations to score."""
    features: str = POOLED
    """What images are described by: `inception` (FID), `dinov2`, `clip`, `file:PATH` (an exported network), `digits-classifier` (a
    small network trained on the real digits), `pooled`: block averages of the training space itself, which needs no weights, or one
    that a plugin registers."""
    reference: str | None = None
    """Real images that samples are compared with: a shard set, a folder or ADM's .npz; None: the training data."""
    pooled: bool = False
    """Whether the same samples are scored on `pooled` features besides (`eval/fd_nfeN`), which cost next to nothing."""
    final_samples: Annotated[int, Field(ge=16, le=10**8)] | None = None
    """Images of the best trial that are scored when the sweep has ended, from noise that no trial was chosen by; None: none."""
    autoencoder: str | None = None
    """Folder or id of the autoencoder that decodes latents for features of images; None: the one the data were made with."""
    batch: Samples = 256
    labels: Literal["balanced", "uniform"] = "balanced"
    """Which labels samples get: every class equally often, or drawn (as the paper's FID is measured)."""
    grid: Annotated[int, Field(ge=1, le=16)] = 10
    """Rows and columns of the sample grid, drawn from the same noise at every evaluation."""
    seed: Seed = 0

    @field_validator("features")
    @classmethod
    def _known_features(cls, name: str) -> str:
        return known_features(name)

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(known_metric, names))

    @field_validator("reference")
    @classmethod
    def _absolute_reference(cls, place: str | None) -> str | None:
        return place if place is None or "://" in place else str(Path(place).expanduser().absolute())

    @model_validator(mode="after")
    def _pooled_has_a_name_of_its_own(self) -> EvaluationConfig:
        if self.pooled and self.distance == "fd" and self.features != POOLED:
            raise ValueError(
                f"`pooled` and features {self.features} have a metric of the same name, eval/fd_nfeN: leave one out"
            )
        return self

    @property
    def also_pooled(self) -> bool:
        """Whether `pooled` features are scored beside others."""
        return self.pooled and self.features != POOLED

    @field_validator("autoencoder")
    @classmethod
    def _absolute_autoencoder(cls, name: str | None) -> str | None:
        return absolute_autoencoder(name)

    @property
    def distance(self) -> str:
        """Name of the Fréchet distance on these features: `fid` is Inception's alone."""
        if self.features == "inception":
            return "fid"
        return f"fd_{self.features}" if self._named_scores else "fd"

    @property
    def _named_scores(self) -> bool:
        return self.features in FEATURES and FEATURES[self.features].named_scores

    def metric_kinds(self, conditional: bool) -> dict[str, str]:
        """Metrics of an evaluation: the name in `eval/NAME_nfeN` -> the metric that it is."""
        kinds = {self.distance: "fid" if self.distance == "fid" else "fd"}
        if self.features == DIGITS and conditional:
            kinds["label_agreement"] = "label_agreement"
        return kinds | {self._reported_name(metric): metric for metric in self.metrics}

    def reported(self, conditional: bool) -> dict[str, Literal["min", "max"]]:
        """Names of the metrics an evaluation reports, with the direction that is better."""
        kinds = self.metric_kinds(conditional)
        names = {
            f"eval/{name}_nfe{n}": METRICS[kind].better for name, kind in kinds.items() for n in self.nfe
        }
        return names | ({f"eval/fd_nfe{n}": "min" for n in self.nfe} if self.also_pooled else {})

    def _reported_name(self, metric: str) -> str:
        """A metric's name in reports: with the features where scores on them are called after these, as `kid_dinov2`."""
        if metric in ("fid", "fd"):
            return self.distance
        return f"{metric}_{self.features}" if self._named_scores else metric
