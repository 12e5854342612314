"""What every process of the tests does first: the order of the files, and Python's garbage collector."""

from __future__ import annotations

import gc

import pytest

LONGEST = (
    "tests/end_to_end/test_digits.py",
    "tests/platform/training/test_ranks.py",
    "tests/platform/training/test_resume.py",
    "tests/docs/test_commands.py",
    "tests/platform/evaluation/test_runner.py",
    "tests/platform/training/test_sharded_training.py",
    "tests/platform/cli/test_outside_input.py",
    "tests/end_to_end/test_scoring_commands.py",
    "tests/compatibility/test_older_files.py",
    "tests/core/test_sharding.py",
    "tests/end_to_end/test_xl2.py",
    "tests/platform/registry/test_promotion.py",
    "tests/platform/jobs/test_promote.py",
    "tests/platform/cli/test_every_command.py",
    "tests/platform/cli/test_usage_errors.py",
    "tests/platform/cli/test_imports.py",
    "tests/platform/storage/test_checkpoints.py",
    "tests/pipelines/storage/test_remote.py",
    "tests/platform/generation/test_remote_sets.py",
    "tests/platform/evaluation/test_evaluator.py",
)
"""Files of more than some ten seconds, the longest first, those that start a Ray apart from each other."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a process of pytest-xdist the longest files come first: none is left for the end, when the others have nothing to do."""
    if hasattr(config, "workerinput"):
        places = {file: place for place, file in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


def pytest_collection_finish() -> None:
    """What was imported lives to the end: Python's garbage collector need not look at it every time."""
    gc.collect()
    gc.freeze()
