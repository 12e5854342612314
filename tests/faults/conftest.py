"""Every fault's outcome, gathered into the table of docs/reliability.md and printed after the tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from watched import Outcome

OUTCOMES: list[Outcome] = []


@pytest.fixture
def outcome() -> Callable[[Outcome], None]:
    """Notes what a fault came to."""
    return OUTCOMES.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not OUTCOMES:
        return
    terminalreporter.section("faults")
    terminalreporter.line("| fault | what the user sees | training again after | steps lost |")
    terminalreporter.line("|---|---|---|---|")
    for outcome in OUTCOMES:
        terminalreporter.line(outcome.row())
