"""Random damage and random values for what comes from outside, and the check that they are refused as input or read."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soflow_core.failures import InputError

FEW, MANY = 30, 500
"""Examples of each test in the default suite, and in the slow one."""
AMOUNTS = [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
SECONDS, MEBIBYTES = 2.0, 500
"""What one example may take: seconds of the process, and memory beyond what it had."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
Edit = tuple[int, str, int]
EDITS: st.SearchStrategy[list[Edit]] = st.lists(
    st.tuples(
        st.integers(0, 2**31), st.sampled_from(["flip", "cut", "drop", "insert", "ff"]), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[Edit]) -> bytes:
    """Content with bytes changed, taken out or put in."""
    data = bytearray(content)
    for place, kind, value in edits:
        at = place % (len(data) + 1)
        if kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + value]
        elif kind == "insert":
            data[at:at] = bytes([value]) * 7
        elif at < len(data):
            data[at] = value if kind == "flip" else 255
    return bytes(data)


def refused_or_read(action: Callable[[], Any]) -> None:
    """Run an action: it succeeds, or raises InputError with a sentence that can be shown, within bounded time and memory."""
    refusal = ""
    begin, before = time.process_time(), peak_mebibytes()
    try:
        action()
    except InputError as error:
        refusal = str(error)
    assert refusal.replace("\n", "").isprintable()
    assert time.process_time() - begin < SECONDS
    assert peak_mebibytes() - before < MEBIBYTES


def peak_mebibytes() -> float:
    """The largest resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def examples(
    amount: int, *strategies: st.SearchStrategy[Any]
) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """A seeded hypothesis test of so many examples."""

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        bounded = settings(
            max_examples=amount,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        return bounded(given(*strategies)(test))

    return decorate
