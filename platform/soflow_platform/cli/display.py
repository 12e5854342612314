"""Terminal output of a running sweep: a table of trials, or lines where there is no terminal, then the result."""

from __future__ import annotations

import contextlib
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from soflow_platform.cli.terminal import duration, progress_bar, storage_flag, styled, tracking_flag
from soflow_platform.cluster.actor_pool import Progress, Report
from soflow_platform.cluster.connection import Cluster
from soflow_platform.config.experiment import Experiment
from soflow_platform.storage.project import ProjectFolder, find_project
from soflow_platform.training.trial_status import TrialState, TrialStatus
from soflow_platform.tuning.display import Display, TrialOutcome
from soflow_platform.tuning.record import SweepRecord
from soflow_platform.tuning.search_space import Trial

REFRESH_SECONDS = 0.5
NEWS_SECONDS = 10
"""Between lines that say how many reference images are described, where there is no terminal."""
PROGRESS_SECONDS = 60
"""Between lines that say how far each trial is, where there is no terminal."""


class SweepDisplay(Display):
    """A live table where there is a terminal; where there is none a line for each evaluation, and one a minute for each trial."""

    def __init__(
        self,
        console: Console,
        experiment: Experiment,
        trials: list[Trial],
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        storage: ProjectFolder | None = None,
    ) -> None:
        """With `quiet` nothing is shown. `clock` is in seconds. `storage` is named by hints; None is the default folder."""
        self.console, self.experiment, self.trials, self.quiet = console, experiment, trials, quiet
        self._clock, self._storage = clock, storage or find_project(None)
        self.training = False
        """Whether trials are under way."""
        self._printed: dict[str, dict[str, float]] = {}
        self._troubles: dict[str, str] = {}
        self._started = self._described = self._reported = clock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(
                styled((f"{self._clock() - self._started:5.0f} s", "dim"), f"  {text}"), highlight=False
            )

    @contextlib.contextmanager
    def describing(self) -> Iterator[Report]:
        if self.quiet or not self.console.is_terminal:
            yield self._print_described
            return
        with progress_bar("real images") as report:
            yield report

    def _print_described(self, progress: Progress) -> None:
        if self._clock() - self._described > NEWS_SECONDS:
            self._described = self._clock()
            self.say(f"{progress.done:,} of {progress.total:,} real images described")

    def start(self, record: SweepRecord, cluster: Cluster, actor: Any) -> None:
        going_on = "going on with" if record.attempts > 1 else "running"
        self.say(
            f"{going_on} sweep {record.id} on {cluster.cpus:g} CPU, {cluster.gpus:g} GPU, {cluster.nodes} node(s)"
        )
        uri = self.experiment.tracking.uri
        self.say(f"see it live: {uri if serves_itself(uri) else how_to_open(uri, self._storage)}")
        self.training = True
        if self.quiet:
            return
        self._reported = self._clock()
        self._stopped.clear()
        self._thread = threading.Thread(target=self._watch, args=(actor,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.training = False
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, actor: Any) -> None:
        if not self.console.is_terminal:
            while not self._stopped.wait(REFRESH_SECONDS):
                statuses = self._snapshot(actor)
                self.report_troubles(statuses)
                self._print_news(statuses)
                self.report_progress(statuses)
            statuses = self._snapshot(actor)
            self.report_troubles(statuses)
            self._print_news(statuses)
            return
        with Live(console=self.console, refresh_per_second=2, transient=False) as live:
            while not self._stopped.wait(REFRESH_SECONDS):
                statuses = self._snapshot(actor)
                # What the console prints stands above the table.
                self.report_troubles(statuses)
                live.update(self.table(statuses))
            live.update(self.table(self._snapshot(actor)))

    def _snapshot(self, actor: Any) -> dict[str, TrialStatus]:
        import ray

        try:
            statuses: dict[str, TrialStatus] = ray.get(actor.snapshot.remote(), timeout=5)
        except (ray.exceptions.RayError, TimeoutError):
            # The table keeps what it last showed; the sweep itself reports its own failures.
            return {}
        return statuses

    def table(self, statuses: dict[str, TrialStatus]) -> Table:
        """One row for each trial: state, progress, speed, loss, and the latest score."""
        metric = self.experiment.search.metric
        table = Table(
            "trial", "state", "progress", "step", "left", "images/s", "loss", metric, box=None, pad_edge=False
        )
        for trial in self.trials:
            status, steps = statuses.get(trial.name, TrialStatus()), trial.experiment.training.steps
            score = status.metrics.get(metric)
            table.add_row(
                trial.name,
                str(status.state),
                ProgressBar(total=steps, completed=status.step, width=20),
                f"{status.step:,}/{steps:,}",
                "-" if status.eta_seconds is None else duration(status.eta_seconds),
                f"{status.images_per_second:,.0f}" if status.images_per_second else "-",
                f"{status.loss:.3f}" if status.loss is not None else "-",
                f"{score:.4g}" if score is not None else "-",
            )
        return table

    def report_progress(self, statuses: Mapping[str, TrialStatus]) -> None:
        """Print a line for each trial under way, if a minute has gone by since the last ones."""
        if self._clock() - self._reported < PROGRESS_SECONDS:
            return
        self._reported = self._clock()
        for trial in self.trials:
            status = statuses.get(trial.name, TrialStatus())
            if not status.state.ended and status.state is not TrialState.WAITING:
                self.say(f"{trial.name} {progress_line(status, trial.experiment.training.steps)}")

    def report_troubles(self, statuses: Mapping[str, TrialStatus]) -> None:
        """Print what keeps a trial from saving or logging when it begins, and that it is over when it ends."""
        for name, status in statuses.items():
            if status.trouble and self._troubles.get(name) != status.trouble:
                self.say(f"{name} {status.trouble}")
                self._troubles[name] = status.trouble
            elif not status.trouble and name in self._troubles:
                del self._troubles[name]
                self.say(f"{name} saves and logs again")

    def _print_news(self, statuses: dict[str, TrialStatus]) -> None:
        for name, status in statuses.items():
            if status.metrics and self._printed.get(name) != status.metrics:
                self._printed[name] = status.metrics
                scores = ", ".join(f"{key} {value:.4g}" for key, value in status.metrics.items())
                self.say(f"{name} step {status.scored_step:,}: {scores}")


def progress_line(status: TrialStatus, steps: int) -> str:
    """`step 120 of 600, 310 images/s, loss 0.412, 12 min left`, with the state before it where that is not `running`."""
    parts = [f"step {status.step:,} of {steps:,}"]
    if status.state is not TrialState.RUNNING:
        parts.insert(0, str(status.state))
    elif status.images_per_second:
        parts.append(f"{status.images_per_second:,.0f} images/s")
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    if status.state is TrialState.RUNNING and status.eta_seconds is not None:
        parts.append(f"{duration(status.eta_seconds)} left")
    return ", ".join(parts)


def show_result(
    screen: Console, record: SweepRecord, storage: ProjectFolder, outcomes: list[TrialOutcome] | None = None
) -> None:
    """The best trial, its numbers, its grid, where to look, and what to type next."""
    _print_unfinished(screen, outcomes or [])
    best = record.best
    if best is None:
        return
    screen.print(styled("\n", ("best trial", "bold"), f"  {best.trial}, step {best.step:,}"), highlight=False)
    for key, value in best.metrics.items():
        screen.print(f"            {key} {value:.4g}", highlight=False)
    if best.mean is not None and best.std is not None:
        screen.print(f"            over seeds {best.mean:.4g} ± {best.std:.2g}", highlight=False)
    for path in best.grids:
        screen.print(f"grid        {path}", highlight=False, soft_wrap=True)
    if best.version is not None:
        registered = f"models:/{best.model}@candidate (version {best.version})"
        if best.outdone_by is not None:
            registered = f"models:/{best.model}/{best.version}"
        screen.print(f"registered  {registered}", highlight=False)
    if best.outdone_by is not None:
        screen.print(f"            @candidate stays: {best.outdone_by}", highlight=False, soft_wrap=True)
    screen.print(f"runs        {record_link(record)}", highlight=False, soft_wrap=True)
    page = how_to_open(record.tracking_uri, storage)
    if not serves_itself(record.tracking_uri):
        screen.print(f"            (start the page with: {page})", highlight=False, soft_wrap=True)
    if best.version is not None:
        flags = storage_flag(storage) + tracking_flag(storage, record.tracking_uri)
        promoted = f"models:/{best.model}" + (f"/{best.version}" if best.outdone_by else "@candidate")
        screen.print(
            f"next        soflowctl promote {shlex.quote(promoted)}{flags}",
            highlight=False,
            soft_wrap=True,
        )


def _print_unfinished(screen: Console, outcomes: list[TrialOutcome]) -> None:
    """A line for each trial that has not reached its last step."""
    for outcome in outcomes:
        status = outcome.status
        if status.state is not TrialState.FINISHED:
            reason = f": {status.failure}" if status.failure else ""
            screen.print(f"{outcome.name} {status.state} at step {status.step:,}{reason}", highlight=False)


def serves_itself(uri: str | None) -> bool:
    """Whether a tracking URI is that of a server, which shows its own page."""
    return (uri or "").startswith(("http://", "https://"))


def how_to_open(uri: str | None, storage: ProjectFolder) -> str:
    """The command that shows the runs of a tracking store that is no server; None is that of the project folder."""
    if uri in (None, storage.tracking_uri):
        return f"soflowctl ui{storage_flag(storage)}"
    return f"mlflow server --backend-store-uri {shlex.quote(str(uri))}"


def record_link(record: SweepRecord) -> str:
    """The sweep's page in MLflow."""
    from soflow_platform.tracking.links import LOCAL_ADDRESS, sweep_page

    uri = record.tracking_uri
    address = uri if uri and serves_itself(uri) else LOCAL_ADDRESS
    return sweep_page(record.experiment_id or "", record.run or "", record.metric, address, record.view)
