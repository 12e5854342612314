"""Mutations of the methods: each stands in the sources, and each turns a test red."""

import pytest

from tests.support.mutations import MUTATIONS, NOTHING, Mutation, run

every_mutation = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)


@every_mutation
def test_a_mutated_text_stands_in_its_file_as_often_as_expected(mutation: Mutation) -> None:
    assert mutation.original.count(mutation.before) == mutation.times
    assert mutation.mutated != mutation.original


@pytest.mark.slow
@every_mutation
def test_a_mutation_is_caught(mutation: Mutation) -> None:
    assert run(mutation, most=1)


@pytest.mark.slow
def test_the_tests_that_run_on_mutations_pass_without_one() -> None:
    assert run(NOTHING) == []
