"""The base class of errors about input, and one-line summaries of exceptions."""

from __future__ import annotations


class InputError(Exception):
    """Raised for input that the user can correct; its text is one sentence: what is wrong, where, and what to do."""


def summarize(error: BaseException) -> str:
    """First line of an exception's text without its full stop, for use inside a sentence; the class name if empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
