"""Pauses between attempts."""

from itertools import islice

from soflow_pipelines.storage.backoff import backoff


def test_pauses_double_up_to_the_longest() -> None:
    assert list(islice(backoff(0.5, 3.0), 5)) == [0.5, 1.0, 2.0, 3.0, 3.0]
