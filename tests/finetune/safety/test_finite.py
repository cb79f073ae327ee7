"""Whether all of a tensor is numbers."""

import math
from itertools import product

import pytest
import torch

from finetune.safety import all_finite


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        *product([torch.bfloat16, torch.float16, torch.float32], [math.nan, math.inf, -math.inf]),
        (torch.float8_e5m2, math.inf),
        (torch.float8_e4m3fn, math.nan),
    ],
)
def test_one_value_that_is_no_number_is_found_wherever_it_stands(
    dtype: torch.dtype, bad: float
) -> None:
    values = torch.randn(7, 11).to(dtype)
    assert all_finite(values)
    for index in (0, 40, 76):
        spoiled = values.clone()
        spoiled.view(-1)[index] = bad
        assert not all_finite(spoiled)


def test_nothing_and_whole_numbers_are_finite() -> None:
    assert all_finite(torch.zeros(0, 3)) and all_finite(torch.arange(3))
