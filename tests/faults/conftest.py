"""Every fault's outcome, gathered into the table of docs/reliability.md and printed after the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.object_store import free_port
from tests.support.watched import RUNNING, Outcome

OUTCOMES: list[Outcome] = []
TIMEOUT = 900
"""Seconds for a test: it trains to the end after its fault, which takes minutes where other programs are at work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(TIMEOUT))


@pytest.fixture
def outcome() -> Callable[[Outcome], None]:
    """Notes what a fault came to."""
    return OUTCOMES.append


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Ends what a test that failed left behind: its commands and their processes."""
    yield
    while RUNNING:
        process = RUNNING.pop()
        if process.poll() is None:
            everyone = psutil.Process(process.pid).children(recursive=True)
            for each in (process, *everyone):
                each.kill()
            process.wait()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without work of its own, as processes on this machine; nodes are added by the test."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not OUTCOMES:
        return
    terminalreporter.section("faults")
    terminalreporter.line("| fault | what the user sees | training again after | steps lost |")
    terminalreporter.line("|---|---|---|---|")
    for outcome in OUTCOMES:
        terminalreporter.line(outcome.row())
