"""What merging refuses; that it computes the same is tested with the methods and in whole runs."""

from __future__ import annotations

import math

import pytest
import torch

from edgepeft.merge import relative_difference


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_nan_in_any_batch_is_a_difference(number: int) -> None:
    reference = [torch.ones(2, 3) for _ in range(3)]
    others = [tensor.clone() for tensor in reference]
    assert relative_difference(reference, others) == 0.0
    others[number][1, 2] = math.nan
    assert not relative_difference(reference, others) <= 1.0


def test_differences_are_relative_to_the_largest_number() -> None:
    reference = [torch.tensor([1.0, -8.0]), torch.tensor([2.0])]
    others = [torch.tensor([1.5, -8.0]), torch.tensor([4.0])]
    assert relative_difference(reference, others) == 0.25
