"""soflowctl logs, stop and status: through files of the project folder, from any machine that sees it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from rich.table import Table

from soflow_platform.cli.terminal import console, duration, plain_table, storage_flag
from soflow_platform.errors import JobError, UserError
from soflow_platform.storage.project import ProjectFolder, find_project
from soflow_platform.training.stop_request import request_stop
from soflow_platform.training.trial_log import LOG, TrialLogReader, read_tail, start_of_last
from soflow_platform.tuning.lookup import SweepRef, resolve
from soflow_platform.tuning.record import all_records
from soflow_platform.tuning.status import TrialReport, sweep_runs, sweep_state, trial_reports

POLL_SECONDS = 0.5


def logs_command(name: str, follow: bool, lines: int, storage_option: str | None) -> None:
    """Print the end of a trial's log, or of all logs of a sweep in the order of time."""
    storage = find_project(storage_option)
    found = resolve(storage, name)
    paths = {trial: storage.trial(found.record.id, trial) / LOG for trial in found.trials}
    try:
        if follow:
            _follow(storage, found, paths, lines)
        elif not _print_tail(paths, lines):
            print(f"{found} has logged nothing yet.", file=sys.stderr)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has enough. Python would complain once more when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_tail(paths: dict[str, Path], lines: int) -> int:
    """Print the last lines of all logs together; returns how many."""
    return _print_last({trial: read_tail(path, lines) for trial, path in paths.items()}, lines)


def _print_last(logs: dict[str, list[str]], lines: int) -> int:
    # Lines begin with their time; the sort is stable, so that those of one second keep their order.
    merged = sorted(
        ((line, trial) for trial, log in logs.items() for line in log), key=lambda item: item[0][:20]
    )
    last = merged[start_of_last([line for line, _ in merged], lines) :]
    for line, trial in last:
        _print_line(line, trial, len(logs))
    return len(last)


def _print_line(line: str, trial: str, logs: int) -> None:
    print(f"{trial}  {line}" if logs > 1 else line, flush=True)


def _follow(storage: ProjectFolder, found: SweepRef, paths: dict[str, Path], lines: int) -> None:
    """Print the present lines and each new one, until the sweep has ended."""
    readers = {trial: TrialLogReader(path) for trial, path in paths.items()}
    _print_last({trial: reader.new_lines() for trial, reader in readers.items()}, lines)
    while True:
        running = sweep_runs(storage, found.record)
        for trial, reader in readers.items():
            for line in reader.new_lines():
                _print_line(line, trial, len(paths))
        if not running:
            return
        time.sleep(POLL_SECONDS)


def stop_command(name: str, wait: float, storage_option: str | None) -> None:
    """Ask a sweep or a trial to stop after the step it is at, and wait until it has."""
    storage = find_project(storage_option)
    found = resolve(storage, name)
    record = found.record
    if not sweep_runs(storage, record):
        raise UserError(
            f"sweep {record.id} is not running ({sweep_state(storage, record)}): there is nothing to stop."
        )
    begun = True
    if found.trial is not None:
        (status,) = trial_reports(storage, record, [found.trial])
        if status.state.ended:
            raise UserError(f"{found} is {status.state}: there is nothing to stop.")
        begun = status.heartbeat_seconds is not None
    request_stop(storage, record.id, found.trial)
    if not begun:
        print(
            f"{found} has not begun: it is passed over when its turn comes, until the sweep is started again."
        )
        return
    print(f"asked {found} to stop after the step it is at; a checkpoint is saved.")
    if wait > 0:
        _wait(storage, found, wait)
        print(f"{found} has stopped; soflowctl run with the same file and settings goes on with it.")
    else:
        print(f"watch it with: soflowctl status {record.id}{storage_flag(storage)}")


def _wait(storage: ProjectFolder, found: SweepRef, seconds: float) -> None:
    """Return when nothing of it runs any more, printing meanwhile what is waited for. Raises JobError after `seconds`."""
    end = time.monotonic() + seconds
    printed = ""
    while True:
        waiting = _still_running(storage, found)
        if not waiting:
            return
        if time.monotonic() >= end:
            raise JobError(
                f"{found} has not stopped within {seconds:g} s, waiting for {waiting}; the request stands: "
                f"see `soflowctl status {found.record.id}{storage_flag(storage)}`."
            )
        if waiting != printed:
            printed = waiting
            print(f"waiting for {waiting}", flush=True)
        time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))


def _still_running(storage: ProjectFolder, found: SweepRef) -> str:
    """What has not stopped yet; empty where all has."""
    if not sweep_runs(storage, found.record):
        return ""
    statuses = trial_reports(storage, found.record, found.trials)
    live = [status for status in statuses if not status.state.ended and status.heartbeat_seconds is not None]
    if live:
        return ", ".join(f"{status.trial} (step {status.step:,})" for status in live)
    if found.trial is not None:
        return "" if statuses[0].state.ended else f"{found.trial} ({statuses[0].state})"
    return "the sweep's command to end"


def status_command(name: str | None, as_json: bool, storage_option: str | None) -> None:
    """Print the state of trials: of the sweep or trial named, else of every running sweep, else of the newest."""
    storage = find_project(storage_option)
    chosen = [resolve(storage, name)] if name else _running_or_newest(storage)
    shown = [(found.record, trial_reports(storage, found.record, found.trials)) for found in chosen]
    if as_json:
        print(json.dumps([status.as_json() for _, statuses in shown for status in statuses], indent=1))
        return
    screen = console()
    if not shown:
        hint = f"soflowctl run digits{storage_flag(storage)}"
        screen.print(
            f"no sweeps under {storage.root}; start one with: {hint}", highlight=False, soft_wrap=True
        )
    for record, statuses in shown:
        attempt = f", started {record.attempts} times" if record.attempts > 1 else ""
        screen.print(
            f"sweep {record.id}: {sweep_state(storage, record)}{attempt}", highlight=False, markup=False
        )
        screen.print(_table(statuses), highlight=False)


def _running_or_newest(storage: ProjectFolder) -> list[SweepRef]:
    records = all_records(storage)
    running = [record for record in records if sweep_runs(storage, record)]
    return [SweepRef(record) for record in running or records[:1]]


def _table(statuses: list[TrialReport]) -> Table:
    table = plain_table(
        "trial", "state", "step", "images/s", "time left", "loss", "checkpoint", "updated", "restarts"
    )
    for status in statuses:
        heartbeat = status.heartbeat_seconds
        table.add_row(
            status.trial,
            f"{status.state}, silent for {heartbeat:.0f} s" if status.stale else str(status.state),
            f"{status.step:,}/{status.steps:,}",
            "-" if status.images_per_second is None else f"{status.images_per_second:,.0f}",
            "-" if status.eta_seconds is None else duration(status.eta_seconds),
            "-" if status.loss is None else f"{status.loss:.4g}",
            "-" if status.checkpoint_step is None else f"step {status.checkpoint_step:,}",
            "-" if heartbeat is None else f"{duration(heartbeat)} ago",
            str(status.restarts),
        )
    return table
