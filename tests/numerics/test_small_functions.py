"""Finiteness, matricisation, and the seeded Gaussian."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt.numerics.finite import all_finite
from distopt.numerics.gaussian import seeded_gaussian
from distopt.numerics.matricize import nearest_to_square


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
@given(size=st.integers(1, 50), place=st.integers(0, 49), bad=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_one_bad_element_is_found(dtype, size, place, bad):
    tensor = torch.ones(size, dtype=dtype)
    assert all_finite(tensor)
    tensor[place % size] = bad
    assert not all_finite(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_sum_that_overflows_is_not_taken_for_infinity(dtype):
    assert all_finite(torch.full((100,), torch.finfo(dtype).max, dtype=dtype))


def test_opposite_infinities_do_not_cancel():
    assert not all_finite(torch.tensor([math.inf, -math.inf]))


@given(st.lists(st.integers(1, 9), min_size=0, max_size=5))
def test_the_split_is_the_best_there_is(shape):
    rows, columns = nearest_to_square(shape)
    total = math.prod(shape)
    assert rows * columns == total
    assert rows + columns == min(math.prod(shape[:i]) + math.prod(shape[i:]) for i in range(max(1, len(shape))))


def test_the_gaussian_is_one():
    sample = seeded_gaussian(300, 300, 7, "name", 3)
    assert abs(float(sample.mean())) < 0.02
    assert abs(float(sample.std()) - 1) < 0.02


@given(key=st.tuples(st.integers(0, 9), st.text(max_size=5), st.integers(0, 99)))
def test_keys_decide_alone(key):
    torch.manual_seed(0)
    first = seeded_gaussian(2, 3, *key)
    torch.manual_seed(1)
    assert torch.equal(first, seeded_gaussian(2, 3, *key))
    assert not torch.equal(first, seeded_gaussian(2, 3, *key, 0))
