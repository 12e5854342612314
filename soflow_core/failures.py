"""Input that cannot be used, and what an exception says in one line."""

from __future__ import annotations


class InputError(Exception):
    """Input of the user's that cannot be used. The text is one sentence: what is wrong, where, and what to do."""


def summarize(error: BaseException) -> str:
    """The first line of an exception's text without its full stop, for use inside a sentence; its class name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
