"""Text from outside as it is shown."""

import pytest

from soflow_core.failures import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cats and öwls 猫", "cats and öwls 猫"),
        ("\x1b]0;title\x07\x1b[2Jx", r"\x1b]0;title\x07\x1b[2Jx"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x9b31m", r"\x9b31m"),
        ("evil\u202egnp.exe", r"evil\u202egnp.exe"),
        ("one\u2028two", r"one\u2028two"),
        (b"\xff\xe9.png".decode("utf-8", "surrogateescape"), r"\xff\xe9.png"),
        ("\ud800", r"\ud800"),
        (7, "7"),
    ],
)
def test_what_does_not_print_is_shown_escaped(text: object, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_line_ends_are_kept_where_a_message_has_several_lines() -> None:
    assert printable("two:\n  \x1b[2Jx", newlines=True) == "two:\n  \\x1b[2Jx"
