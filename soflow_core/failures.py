"""The base class of errors about input, and one-line summaries of exceptions."""

from __future__ import annotations


class InputError(Exception):
    """Raised for input that the user can correct; its text is one sentence: what is wrong, where, and what to do."""


def summarize(error: BaseException) -> str:
    """First line of an exception's text without its full stop, for use inside a sentence; the class name if empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def printable(text: object, newlines: bool = False) -> str:
    """Text that is safe to show in a terminal, a log or a table: characters that do not print are escaped as in Python.

    Escaped are control characters (so that no file name moves the cursor, clears the screen or sets the window's title),
    marks that change the direction of writing, line and paragraph separators, and bytes of a file name that are not UTF-8
    (`\\xff`). `newlines` keeps line ends, for messages of several lines.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or (newlines and c == "\n") else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        # A byte that Python's file system encoding could not decode (PEP 383).
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
