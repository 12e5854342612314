"""The training data of a sweep, opened, with the reference statistics that its trials are scored against."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from soflow_pipelines.shards.info import DatasetInfo
from soflow_platform.cluster.connection import Cluster
from soflow_platform.config.experiment import Experiment
from soflow_platform.evaluation.evaluator import Evaluator
from soflow_platform.evaluation.runner import RayStatisticsRunner
from soflow_platform.tracking.environment import host_tags
from soflow_platform.training.dataset import open_data
from soflow_platform.training.model import network_config
from soflow_platform.tuning.context import SweepContext
from soflow_platform.tuning.search_space import Trial


@dataclass(frozen=True)
class PreparedData:
    """The training data, opened, with its reference statistics computed."""

    location: str
    info: DatasetInfo
    evaluator_tags: Mapping[str, str]
    host_tags: Mapping[str, str]

    def check(self, trial: Trial) -> None:
        """Raises UserError where the data do not fit a trial's network."""
        network_config(trial.experiment, self.info)

    def tags(self, experiment: Experiment) -> dict[str, str]:
        """Tags of the run of a sweep or of a trial with these settings."""
        return {
            "method": experiment.objective.method,
            "network": experiment.network.title,
            **(
                {"plugins": ", ".join(f"{p.module} (sha256 {p.digest})" for p in experiment.plugins)}
                if experiment.plugins
                else {}
            ),
            "data.source": str(experiment.data.source),
            "data.digest": self.info.digest,
            **self.host_tags,
            **self.evaluator_tags,
        }


def prepare(context: SweepContext, cluster: Cluster | None = None) -> PreparedData:
    """Open the data, and compute the reference statistics where they are missing, on the cluster if there is one.

    Raises UserError where the data do not fit a trial's network.
    """
    experiment = context.experiment
    location, info = open_data(experiment, context.project)
    for trial in context.trials:
        network_config(trial.experiment, info)
    with contextlib.ExitStack() as stack:
        compute = None
        if cluster is not None:
            report = stack.enter_context(context.display.describing())
            runner = RayStatisticsRunner(context.project, report=report, cluster=cluster)
            compute = stack.enter_context(runner).one
        evaluator = Evaluator.open(
            experiment.evaluation, info, location, experiment.data.conditional, context.project, compute
        )
    if evaluator.without_grids is not None:
        context.display.say(evaluator.without_grids)
    return PreparedData(location, info, evaluator.tags(), host_tags())
