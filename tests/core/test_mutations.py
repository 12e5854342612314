"""Every broken line turns a test red."""

import pytest

from tests.support.mutations import MUTATIONS, NOTHING, run


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_broken_line_is_seen(mutation):
    assert run(mutation, most=1)


@pytest.mark.slow
def test_the_sound_code_is_green_in_the_copy_where_mutations_run():
    assert run(NOTHING) == []
