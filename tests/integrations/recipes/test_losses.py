"""What is known of the losses that the recipes are made of: their gradients, and what likelihood each of them is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Normal
from torch.nn import functional

logits = st.floats(-10, 10)


def gradient(loss, z):
    at = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    loss(at).backward()
    return at.grad.item()


@given(z=logits, y=st.floats(0, 1))
def test_a_sigmoid_under_squared_error_learns_by_its_slope(z, y):
    a = 1 / (1 + math.exp(-z))
    found = gradient(lambda at: 0.5 * (at.sigmoid() - y) ** 2, z)
    assert found == pytest.approx((a - y) * a * (1 - a), rel=1e-9, abs=1e-15)


@given(z=logits, y=st.floats(0, 1))
def test_a_sigmoid_under_cross_entropy_does_not(z, y):
    target = torch.tensor(y, dtype=torch.float64)
    found = gradient(lambda at: functional.binary_cross_entropy_with_logits(at, target), z)
    assert found == pytest.approx(1 / (1 + math.exp(-z)) - y, rel=1e-9, abs=1e-12)


@given(a=st.floats(0.01, 0.99), y=st.floats(0, 1))
def test_the_cross_entropy_of_a_probability(a, y):
    """(a - y) / (a (1 - a)), and not (1 - y) / ((1 - a) a)."""
    target = torch.tensor(y, dtype=torch.float64)
    found = gradient(lambda at: functional.binary_cross_entropy(at, target), a)
    assert found == pytest.approx((a - y) / (a * (1 - a)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("z", "y"), [(10.0, 0.0), (-10.0, 1.0)])
def test_where_it_is_sure_and_wrong_squared_error_hardly_learns(z, y):
    target = torch.tensor(y, dtype=torch.float64)
    squared = gradient(lambda at: 0.5 * (at.sigmoid() - target) ** 2, z)
    entropy = gradient(lambda at: functional.binary_cross_entropy_with_logits(at, target), z)
    assert squared / entropy == pytest.approx(4.5e-5, rel=0.02)


@given(found=st.floats(-5, 5), y=st.floats(-5, 5), sigma=st.floats(0.1, 5))
def test_squared_error_is_a_gaussian_of_fixed_width(found, y, sigma):
    """Up to a constant, ln(sigma) and not sigma squared among it."""
    told = -Normal(found, sigma).log_prob(torch.tensor(y, dtype=torch.float64)).item()
    constant = math.log(sigma) + 0.5 * math.log(2 * math.pi)
    assert told - constant == pytest.approx((found - y) ** 2 / (2 * sigma**2), rel=1e-4, abs=1e-6)


@given(z=logits, y=st.sampled_from([0.0, 1.0]))
def test_cross_entropy_is_a_bernoulli(z, y):
    at, target = torch.tensor(z, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    told = -Bernoulli(logits=at).log_prob(target).item()
    assert told == pytest.approx(functional.binary_cross_entropy_with_logits(at, target).item(), rel=1e-12)
