"""Numbers of a counter: the published generator, exact series, and distributions; the same in any split of the rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from soflow_core.counter_draws import (
    CACHED_BLOCKS,
    MASK,
    POSTERIOR,
    STEP,
    fourth_word,
    integer_rows,
    normal_pair,
    normal_rows,
    philox,
    uniform_rows,
)

WORDS = st.integers(0, MASK)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_published_vectors(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


@given(first=WORDS, second=WORDS)
def test_normals_are_box_mullers(first: int, second: int) -> None:
    radius = math.sqrt(-2 * math.log((first + 0.5) / 2**32))
    angle = 2 * math.pi * second / 2**32
    found = [n.item() for n in normal_pair(torch.tensor([first]), torch.tensor([second]))]
    expected = [radius * math.cos(angle), radius * math.sin(angle)]
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("first", [0, 1, MASK // 2, MASK // 2 + 1, MASK - 1, MASK])
@pytest.mark.parametrize("second", [0, 2**29 - 1, 2**29, 2**30, 3 * 2**29, 2**31, 7 * 2**29, MASK])
def test_normals_are_finite_where_branches_meet(first: int, second: int) -> None:
    test_normals_are_box_mullers.hypothesis.inner_test(first, second)


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_are_those_that_checkpoints_rely_on(device: str) -> None:
    """To the last bit, on every device: a training that goes on draws what it would have drawn."""
    rows = torch.tensor([0, 5, 2**33 + 1], device=device)
    normal = normal_rows(2**40 + 7, rows, (3,), 11, fourth_word(STEP, 2))
    assert [[x.hex() for x in row] for row in normal.double().tolist()] == NORMALS
    uniform = uniform_rows(2**40 + 7, rows, 11, fourth_word(STEP, 2))
    assert [x.hex() for x in uniform.double().tolist()] == UNIFORMS
    precise = uniform_rows(2**40 + 7, rows, 11, fourth_word(STEP, 2), torch.float64)
    assert [x.hex() for x in precise.tolist()] == PRECISE
    assert integer_rows(2**40 + 7, rows, 1000, 11, fourth_word(POSTERIOR)).tolist() == INTEGERS


NORMALS = [
    ["0x1.7389bc0000000p+0", "0x1.6c55d40000000p+0", "-0x1.a7665a0000000p-1"],
    ["-0x1.9377620000000p+0", "0x1.4ad4660000000p-1", "-0x1.ac44d20000000p+0"],
    ["-0x1.dac00e0000000p-4", "-0x1.e72d2a0000000p-1", "0x1.830b5e0000000p-1"],
]
UNIFORMS = ["0x1.037df80000000p-3", "0x1.e00f600000000p-3", "0x1.4368880000000p-1"]
PRECISE = ["0x1.037df81f99e90p-3", "0x1.e00f627025b58p-3", "0x1.4368892ec3ebfp-1"]
INTEGERS = [481, 173, 815]


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_is_the_same_in_any_part_of_the_rows(device: str) -> None:
    shape = (2, CACHED_BLOCKS // 8, 3)
    rows = torch.arange(7, device=device)
    whole = normal_rows(3, rows, shape, 4, 5)
    for world in (2, 4):
        for rank in range(world):
            assert torch.equal(normal_rows(3, rows[rank::world], shape, 4, 5), whole[rank::world])
    third = torch.arange(7, device=device)
    by_row = normal_rows(3, rows, (5,), third, 5)
    for row in range(7):
        assert torch.equal(normal_rows(3, rows[row : row + 1], (5,), row, 5)[0], by_row[row])


def test_every_word_of_the_counter_and_the_key_counts() -> None:
    row = torch.tensor([1])
    drawn = [
        normal_rows(seed, row + extra, (4,), third, fourth)
        for seed in (0, 1, 2**32, 2**63)
        for extra in (0, 1)
        for third in (0, 1)
        for fourth in (fourth_word(STEP), fourth_word(STEP, 1), fourth_word(POSTERIOR))
    ]
    assert len({tuple(numbers[0].tolist()) for numbers in drawn}) == len(drawn)
    assert len(set(drawn[0][0].tolist())) == 4
    with pytest.raises(ValueError, match="outside 0 to 65535"):
        fourth_word(STEP, 2**16)


def largest_gap(sample: Tensor, distribution: Tensor) -> float:
    """Kolmogorov and Smirnov's statistic times the root of the sample's size; 1.95 is exceeded by 1 of 1000."""
    count = len(sample)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    gap = torch.maximum(steps[1:] - distribution, distribution - steps[:-1]).max()
    return gap.item() * math.sqrt(count)


def test_distributions_are_normal_and_uniform_and_rows_and_draws_are_uncorrelated() -> None:
    one, other = (normal_rows(9, torch.arange(500), (400,), step, 0).double() for step in (0, 1))
    flat = one.flatten().sort().values
    assert largest_gap(flat, torch.special.ndtr(flat)) < 1.95
    assert (flat**4).mean().item() == pytest.approx(3, abs=0.06)
    assert flat.abs().max() > 4
    pairs = ((one, other), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[:, 2:], one[:, :-2]))
    assert max(abs((a * b).mean().item()) for a, b in pairs) < 0.01
    for dtype in (torch.float32, torch.float64):
        uniform = uniform_rows(9, torch.arange(100_000), 0, 0, dtype).double().sort().values
        assert uniform[0] >= 0
        assert uniform[-1] < 1
        assert largest_gap(uniform, uniform) < 1.95
    counts = integer_rows(9, torch.arange(100_000), 10, 0, 0).bincount(minlength=10)
    assert len(counts) == 10
    assert (counts - 10_000).abs().max() < 400
