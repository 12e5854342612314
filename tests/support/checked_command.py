"""Commands in this process that must end with a sentence and an exit code, whatever they are given."""

from __future__ import annotations

import sys

import pytest

from soflow_platform.cli.main import main
from tests.support.fuzz import refused_or_read

REPORTS = ("doctor",)
"""Commands whose exit code 1 stands for a line of their report."""


class CheckedCommand:
    """Runs commands and checks how they end: 0, or 1 or 2 with a sentence; no traceback, no escape, bounded time and memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> int:
        self._monkeypatch.setattr(sys, "argv", ["soflowctl", *arguments])
        codes: list[int] = []

        def run() -> None:
            with pytest.raises(SystemExit) as ended:
                main()
            codes.append(ended.value.code)

        refused_or_read(run)
        shown = self._capsys.readouterr()
        assert codes[0] in (0, 1, 2), shown.err
        if arguments[0] not in REPORTS or codes[0] != 1:
            assert (codes[0] == 0) == ("soflowctl: " not in shown.err), shown.err
        assert "This is a bug" not in shown.err, shown.err
        assert "Traceback" not in shown.err
        assert (shown.out + shown.err).replace("\n", "").isprintable()
        return codes[0]
