"""Schema of a whole sweep file: sections, checks across them, and the digest that identifies a sweep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from soflow_core.augmentation import LABELS
from soflow_core.networks import NETWORKS
from soflow_core.networks.dit import PARITY
from soflow_core.objectives import OBJECTIVES, Objective
from soflow_core.optimizer import OptimizerConfig
from soflow_core.settings import identifying
from soflow_platform.config.comparison import USUAL_COMPARISON, SamplingConfig
from soflow_platform.config.evaluation import DIGITS, EvaluationConfig
from soflow_platform.config.gate import RegistryConfig
from soflow_platform.config.mid_run import changeable, check_order, may_change, rebuilt_for, with_changes
from soflow_platform.config.parts import PartOf, network_section
from soflow_platform.config.plugin_settings import Plugins
from soflow_platform.config.sampling_settings import SamplingSection, with_sampling
from soflow_platform.config.search import LATER_FINAL_SETTINGS, LOGGED_METRICS, TRAINING_SECONDS, SearchConfig
from soflow_platform.config.sections import (
    DataConfig,
    Section,
    Seed,
    TrackingConfig,
)
from soflow_platform.config.step_options import obstacle_to_graphs, obstacle_to_recompute
from soflow_platform.config.training import AlignmentConfig, ResourcesConfig, TrainingConfig

DECIDING_SECTIONS = ("seed", "data", "network", "objective", "optimizer")
DECIDING_TRAINING = ("steps", "batch", "ema", "precision", "clip_norm")
"""Settings that decide a sweep's numbers and what they are compared by. The others (machines, pace of logs and checkpoints, places,
descriptions) may differ each time that the sweep is started."""
LATER_SEARCH_SETTINGS: dict[str, Any] = {
    "first": [],
    "constraints": [],
    "seeds": 1,
    "startup": 10,
    "final": None,
    "objectives": [],
    "stop": {},
    "pbt": None,
}
"""Settings that `search` has got since 0.1.0, with the values at which nothing changes. With these they are no part of the digest, so
that sweeps keep it; of methods and networks, the settings that are marked as inert."""
LATER_ASHA_SETTINGS: dict[str, Any] = {"metric": None}
"""The same of `search.asha`."""
COMPARING_SEARCH = ("metric", "mode", "objectives", "asha", "stop")
"""Settings of `search` that decide how trials are compared, and not which there are."""
LATER_EVALUATION_SETTINGS: dict[str, Any] = {"reference": None, "pooled": False, "metrics": []}
"""The same of `evaluation`; `final_samples` decides no number of a trial and is never part of it."""
LATER_NETWORK_SETTINGS: dict[str, Any] = {"kind": "dit", **PARITY}
"""The same of `network`."""
LATER_TRAINING_SETTINGS: dict[str, Any] = {
    "start_from": None,
    "start_weights": "ema",
    "start_layout": None,
    "ema_profiles": [],
    "ema_every": 1,
    "augment": None,
    "draws": "auto",
    "alignment": AlignmentConfig().model_dump(mode="json"),
    "changes": [],
    "class_run": 1,
}
"""The same of `training`."""


class Experiment(Section):
    """One trial's complete settings together with the search around it."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]
    description: str = ""
    plugins: Plugins = ()
    """Modules that register methods and networks: names, or paths of `.py` files or packages."""
    seed: Seed = 0
    data: DataConfig
    network: Annotated[Any, PartOf(NETWORKS, network_section)]
    objective: Annotated[Any, PartOf(OBJECTIVES)]
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig
    sampling: SamplingSection = SamplingSection()
    comparison: tuple[SamplingConfig, ...] = USUAL_COMPARISON
    search: SearchConfig = SearchConfig()
    resources: ResourcesConfig = ResourcesConfig()
    tracking: TrackingConfig = TrackingConfig()
    registry: RegistryConfig = RegistryConfig()

    @model_validator(mode="after")
    def _batch_divides(self) -> Experiment:
        training, resources = self.training, self.resources
        whole = training.accumulate > 1 or training.parallel == "fsdp" or self.objective.compares_images
        for workers in resources.possible_workers if whole else [resources.workers]:
            if training.batch % (workers * training.accumulate):
                pieces = f" in {training.accumulate} pieces each" if training.accumulate > 1 else ""
                fitting = [
                    n for n in range(1, 2 * workers + 1) if training.batch % (n * training.accumulate) == 0
                ]
                raise ValueError(
                    f"training.batch ({training.batch}) does not divide over {workers} worker(s){pieces} "
                    "(resources.workers, resources.min_workers, training.accumulate): take a multiple, or workers of "
                    f"{', '.join(map(str, fitting)) or 'no number here: lower training.accumulate'}"
                )
        return self

    @model_validator(mode="after")
    def _fsdp_has_several_workers(self) -> Experiment:
        if self.training.parallel == "fsdp" and self.resources.workers == 1:
            raise ValueError(
                "training.parallel fsdp shares a network among workers: raise resources.workers above 1"
            )
        return self

    @model_validator(mode="after")
    def _graphs_can_be_recorded(self) -> Experiment:
        if self.training.graphs:
            obstacle = obstacle_to_graphs(self.training, self.resources, self.network, self.objective)
            if obstacle is not None:
                raise ValueError(f"training.graphs {obstacle}, or leave training.graphs out")
        return self

    @model_validator(mode="after")
    def _blocks_can_be_recomputed(self) -> Experiment:
        if self.training.recompute:
            obstacle = obstacle_to_recompute(self.network.architecture_class, self.objective)
            if obstacle is not None:
                raise ValueError(
                    f"training.recompute {obstacle}: leave it out, or take training.accumulate for less memory"
                )
        return self

    @model_validator(mode="after")
    def _augmentation_and_average_fit(self) -> Experiment:
        known = getattr(self.network, "augmentations", 0)
        if self.training.augment is not None and known != LABELS:
            raise ValueError(
                f"training.augment gives the network {LABELS} labels and it knows {known}: set network.augmentations to {LABELS} (kind "
                "unet), or leave training.augment out"
            )
        if self.training.ema_every > 1 and self.objective.teacher_decay is not None:
            raise ValueError(
                f"training.ema_every is {self.training.ema_every}, and {self.objective.method} has a teacher, averaged every step: "
                "set it to 1"
            )
        return self

    @model_validator(mode="after")
    def _alignment_fits(self) -> Experiment:
        alignment = self.training.alignment
        if alignment.active and self.training.parallel == "fsdp":
            raise ValueError(
                "training.alignment trains a head beside the network, which fsdp does not exchange: set training.parallel to ddp"
            )
        if alignment.active and alignment.features == DIGITS and self.data.source != "digits":
            raise ValueError(
                f"training.alignment.features {DIGITS} describes data.source digits only: name another network"
            )
        return self

    @model_validator(mode="after")
    def _steps_are_within_the_training(self) -> Experiment:
        for setting, step in self._steps_within().items():
            if step is not None and step > self.training.steps:
                raise ValueError(
                    f"{setting} ({step}) is beyond training.steps ({self.training.steps}): lower it"
                )
        return self

    @model_validator(mode="after")
    def _metric_is_reported(self) -> Experiment:
        reported = self.evaluation.reported(self.data.conditional)
        if self.search.metric not in reported:
            raise ValueError(
                f"search.metric {self.search.metric!r} is never reported: this sweep reports {', '.join(reported)}; "
                "`evaluation.metrics` adds others"
            )
        final = self.search.final
        own = {
            "asha.metric": self.search.asha and self.search.asha.metric,
            "pbt.metric": self.search.pbt and self.search.pbt.metric,
            **{f"final.metrics.{method}": name for method, name in (final.metrics if final else {}).items()},
        }
        for setting, metric in own.items():
            if metric is not None and metric not in reported:
                raise ValueError(
                    f"search.{setting} {metric!r} is never reported: this sweep reports {', '.join(reported)}; "
                    "`evaluation.nfe`, `pooled` and `metrics` add others"
                )
        for name in self.search.stop:
            if name not in reported and name not in LOGGED_METRICS:
                known = ", ".join((*LOGGED_METRICS, *reported))
                raise ValueError(
                    f"search.stop has {name!r}, which is never reported: this sweep reports {known}"
                )
        for name in self.search.objectives:
            if name not in reported and name != TRAINING_SECONDS:
                known = ", ".join((*reported, TRAINING_SECONDS))
                raise ValueError(
                    f"search.objectives has {name!r}, which is never reported: this sweep reports {known}"
                )
        return self

    @model_validator(mode="after")
    def _digits_classifier_scores_digits(self) -> Experiment:
        if self.evaluation.features == "digits-classifier" and self.data.source != "digits":
            raise ValueError(
                "evaluation.features digits-classifier scores data.source digits only: use pooled"
            )
        return self

    @model_validator(mode="after")
    def _changes_are_possible(self) -> Experiment:
        changes = self.training.changes
        check_order(changes, self.training.steps, self.objective)
        for change in changes:
            try:
                later = self.at(change.after + 1)
            except ValidationError as error:
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"training.changes after step {change.after}: {message}") from None
            if differing := rebuilt_for(self.objective, later.objective):
                raise ValueError(
                    f"training.changes after step {change.after} changes what network and workers are built for ({differing}): "
                    "keep that"
                )
        return self

    @model_validator(mode="after")
    def _population_can_change(self) -> Experiment:
        search, training = self.search, self.training
        if search.pbt is None:
            return self
        for key in dict.fromkeys((*search.space, *(key for point in search.first for key in point))):
            if key != "name" and not may_change(self.objective, key):
                raise ValueError(
                    f"search.pbt changes settings in mid-run and `{key}` stays for a whole training: "
                    f"vary {changeable(self.objective)}"
                )
        if search.pbt.every % self.evaluation.every:
            raise ValueError(
                f"search.pbt.every ({search.pbt.every}) is no multiple of evaluation.every ({self.evaluation.every}), at which "
                "trials are scored: make it one"
            )
        if search.pbt.every == training.steps:
            raise ValueError(
                f"search.pbt.every ({search.pbt.every}) is training.steps, where nothing is left to train: lower it"
            )
        if training.ema_profiles:
            raise ValueError(
                "search.pbt copies checkpoints, without the snapshots of training.ema_profiles: leave them out"
            )
        return self

    def at(self, step: int) -> Experiment:
        """The settings of a step, counted from 1: with the changes of `training.changes` before it, and with none to come."""
        changes = [change for change in self.training.changes if change.after < step]
        return Experiment(**with_changes(self.resolved(), changes)) if self.training.changes else self

    def _steps_within(self) -> dict[str, int | None]:
        """Settings that name a step of the training."""
        return {
            "evaluation.every": self.evaluation.every,
            "training.ema_snapshot_every": self.training.ema_snapshot_every,
            "optimizer.warmup_steps": self.optimizer.warmup_steps,
            "search.asha.first_rung": self.search.asha.first_rung if self.search.asha else None,
            "search.pbt.every": self.search.pbt.every if self.search.pbt else None,
        }

    @property
    def mode(self) -> str:
        """`min` or `max`: which value of `search.metric` is better."""
        return self.search.mode or self.evaluation.reported(self.data.conditional)[self.search.metric]

    @property
    def rung_metric(self) -> tuple[str, str]:
        """What trials are compared by at rungs, and `min` or `max`."""
        scheduler = self.search.asha or self.search.pbt
        own = scheduler.metric if scheduler else None
        if own is None or own == self.search.metric:
            return self.search.metric, self.mode
        return own, self.evaluation.reported(self.data.conditional)[own]

    @property
    def objective_modes(self) -> dict[str, str]:
        """`min` or `max` for `search.metric` and each of `search.objectives`, in this order."""
        reported = {**self.evaluation.reported(self.data.conditional), TRAINING_SECONDS: "min"}
        return {self.search.metric: self.mode, **{name: reported[name] for name in self.search.objectives}}

    @property
    def sampled_objective(self) -> Objective:
        """The method as its trained network is sampled. Raises UserError where it cannot be sampled as `sampling` says."""
        return with_sampling(self.at(self.training.steps).objective, self.sampling.settings)

    @property
    def model_name(self) -> str:
        """Name in the model registry."""
        return self.registry.model or self.name

    def resolved(self) -> dict[str, Any]:
        """Every setting as plain JSON data, defaults included; `Experiment(**...)` reads it back."""
        data: dict[str, Any] = self.model_dump(mode="json")
        return data

    def digest(self) -> str:
        """Eight characters that change with what decides the numbers: a sweep is the same sweep when its digest is."""
        resolved = self.resolved()
        search = _search_of_the_digest(resolved["search"])
        evaluation = _evaluation_of_the_digest(resolved)
        return _digest({**self._training(), **self._sampled(), "evaluation": evaluation, "search": search})

    def training_digest(self) -> str:
        """Eight characters that change with what decides the weights of a trial with these settings."""
        return _digest({**self._training(), "stop": self.resolved()["search"]["stop"]})

    def continuation_digest(self) -> str:
        """As `training_digest`, of trainings that differ in `training.steps` alone."""
        settings = self._training()
        del settings["training"]["steps"]
        return _digest({**settings, "stop": self.resolved()["search"]["stop"]})

    def scoring_digest(self) -> str:
        """Eight characters that change with what trials are scored and compared by: trials of one sweep have it in common."""
        resolved = self.resolved()
        search = {key: resolved["search"][key] for key in COMPARING_SEARCH}
        # What is added later is no setting of older sweeps.
        search["asha"] = _without(search["asha"] or {}, LATER_ASHA_SETTINGS) or None
        if resolved["search"]["pbt"] is not None:
            search["pbt"] = resolved["search"]["pbt"]
        evaluation = _evaluation_of_the_digest(resolved)
        return _digest(
            {**self._sampled(), "data": resolved["data"], "evaluation": evaluation, "search": search}
        )

    def _sampled(self) -> dict[str, Any]:
        """The section `sampling` where it says anything: it decides no weights, and the scores that trials are compared by."""
        if not self.sampling.settings:
            return {}
        return {"sampling": self.sampling.model_dump(mode="json", exclude={"steps"}, exclude_none=True)}

    def _training(self) -> dict[str, Any]:
        """The settings that decide the weights of a trial."""
        resolved = self.resolved()
        settings = {section: resolved[section] for section in DECIDING_SECTIONS}
        settings["objective"] = identifying(type(self.objective), resolved["objective"])
        settings["network"] = _without(resolved["network"], LATER_NETWORK_SETTINGS)
        if self.plugins:
            settings["plugins"] = sorted((plugin.module, plugin.digest) for plugin in self.plugins)
        training = resolved["training"]
        later = {key: training[key] for key in LATER_TRAINING_SETTINGS}
        deciding = {key: training[key] for key in DECIDING_TRAINING}
        settings["training"] = deciding | _without(later, LATER_TRAINING_SETTINGS)
        return settings


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _evaluation_of_the_digest(resolved: dict[str, Any]) -> dict[str, Any]:
    evaluation = _without(resolved["evaluation"], LATER_EVALUATION_SETTINGS)
    return {key: value for key, value in evaluation.items() if key != "final_samples"}


def _without(settings: dict[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that have the values of `later`."""
    return {key: value for key, value in settings.items() if key not in later or value != later[key]}


def _search_of_the_digest(search: dict[str, Any]) -> dict[str, Any]:
    """The settings of `search` that decide what is trained and how it is compared."""
    kept = _without(search, LATER_SEARCH_SETTINGS)
    if kept["asha"] is not None:
        kept["asha"] = _without(kept["asha"], LATER_ASHA_SETTINGS)
    if kept.get("final"):
        kept["final"] = _without(kept["final"], LATER_FINAL_SETTINGS)
    first_kinds = ("uniform", "log_uniform")
    kept["space"] = {
        key: {name: each for name, each in way.items() if name in first_kinds or each is not None}
        if isinstance(way, dict)
        else way
        for key, way in search["space"].items()
    }
    return kept


def trial_params(experiment: Experiment) -> dict[str, Any]:
    """The settings that decide a trial's numbers, flat and without those that are not set: the params of its run."""
    around = {"name", "description", "plugins", "comparison", "search", "resources", "tracking", "registry"}
    own = {key: value for key, value in experiment.resolved().items() if key not in around}
    return {key: value for key, value in flatten(own).items() if value is not None}


MAX_COLUMNS = 30
"""Params that are shown beside each other."""


def varied_params(experiments: Sequence[Experiment]) -> list[str]:
    """Params in which trials differ, at most MAX_COLUMNS of them."""
    all_params = [trial_params(experiment) for experiment in experiments]
    keys = dict.fromkeys(key for params in all_params for key in params)
    return [key for key in keys if len({str(params.get(key)) for params in all_params}) > 1][:MAX_COLUMNS]


def flatten(resolved: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings -> `{"objective.guidance.scale": 3.0}`; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in resolved.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
