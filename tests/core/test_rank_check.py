"""Digests of tensors are equal where the tensors are equal bit for bit."""

import pytest
import torch

from soflow_core.rank_check import digest, first_difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_a_digest_is_of_the_bits(dtype: torch.dtype) -> None:
    values = (10 * torch.randn(50, generator=torch.Generator().manual_seed(0))).to(dtype)
    other = values.clone()
    assert torch.equal(digest([values]), digest([other.reshape(5, 10)]))
    other[7] = 1 - other[7] if dtype != torch.bool else ~other[7]
    assert not torch.equal(digest([values]), digest([other]))
    assert first_difference(["a", "b"], [other, values], lambda mine: [mine, digest([other, other])]) == "b"


def test_a_digest_knows_the_order_and_the_last_bit() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(digest([values]), digest([values.flip(0)]))
    assert not torch.equal(
        digest([values]), digest([torch.nextafter(values, values + (values == values[9]))])
    )


def test_what_is_not_there_or_not_a_number_has_a_digest() -> None:
    assert not torch.equal(digest([None]), digest([torch.zeros(0)]))
    signed = torch.tensor([float("nan"), -float("nan"), 1.0])
    assert torch.equal(digest([signed]), digest([torch.tensor([float("nan"), float("nan"), 1.0])]))
    assert not torch.equal(digest([torch.tensor([0.0])]), digest([torch.tensor([-0.0])]))


def test_equal_tensors_on_all_ranks_have_no_difference() -> None:
    tensors = [torch.ones(3), None, torch.zeros(0)]
    assert first_difference(["a", "b", "c"], tensors, lambda mine: [mine, digest(tensors), mine]) is None
