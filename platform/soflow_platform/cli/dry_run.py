"""soflowctl run --dry-run: the plan of a sweep, what it asks Ray for, and whether it could start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from soflow_platform.cli.plan import amount_lines, notes, plan_table, short_plan
from soflow_platform.cli.sweep_file import compared_by, later_trials, steps_of
from soflow_platform.cli.terminal import styled
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import UserError
from soflow_platform.training.dataset import check_data
from soflow_platform.tuning.plan import plan_sweep
from soflow_platform.tuning.plan_assumptions import Assumptions
from soflow_platform.tuning.search_space import Trial

if TYPE_CHECKING:
    from rich.console import Console


def print_dry_run(screen: Console, experiment: Experiment, trials: list[Trial], root: Path) -> None:
    """Print it. A sweep whose cost depends on data that are not there is printed without its cost."""
    screen.print(styled((experiment.name, "bold"), f": {experiment.description}"))
    for trial in trials:
        screen.print(f"{trial.name}, {trial.experiment.training.steps:,} steps", highlight=False)
    try:
        plan = plan_sweep(experiment, trials, Assumptions())
    except UserError as error:
        screen.print(f"its cost cannot be told: {error}", highlight=False)
    else:
        screen.print(plan_table(plan, plan.on_gpus))
        for title, text in [*amount_lines(plan), *notes(plan)]:
            screen.print(styled((f"{title:<12}", "bold"), text), soft_wrap=True)
        screen.print(short_plan(plan))
    screen.print(
        f"{len(trials)} trials{later_trials(experiment)} of {steps_of(trials)} steps, "
        f"{experiment.training.batch} samples in each step"
    )
    screen.print(compared_by(experiment))
    screen.print(f"asks Ray for {request(experiment)}")
    screen.print(f"storage {root}")
    try:
        check_data(experiment)
        screen.print(f"data {experiment.data.source}")
    except UserError as error:
        screen.print(f"before it can run: {error}")


def request(experiment: Experiment) -> str:
    """The resources that a trial requests from Ray, as text."""
    resources = experiment.resources
    each = f"{resources.cpus_per_worker:g} CPU" + (
        f" and {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else ""
    )
    total_cpus = resources.workers * resources.cpus_per_worker
    total_gpus = resources.workers * resources.gpus_per_worker
    total = f"{total_cpus:g} CPU" + (f", {total_gpus:g} GPU" if total_gpus else "")
    return f"{resources.workers} worker(s) of {each} for each trial ({total})"
