"""What an exception says, in one line."""

from __future__ import annotations


def summarize(error: BaseException) -> str:
    """What an exception says, for a place inside a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
