"""What several tests of commands share."""

from __future__ import annotations

import pytest

from tests.support.checked_command import CheckedCommand


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CheckedCommand:
    monkeypatch.setenv("COLUMNS", "200")
    return CheckedCommand(monkeypatch, capsys)
