"""Hinge and R1: laws first, then R1 on a linear discriminator, whose gradient is its weight."""

import pytest
import torch
from distopt.integrations.biggan.losses import discriminator_hinge, generator_hinge, gradient_penalty
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distopt.errors import SettingError

SCORES = st.lists(st.floats(-100, 100), min_size=1, max_size=8)


@given(SCORES)
def test_the_hinge_is_zero_exactly_beyond_both_margins(values):
    scores = torch.tensor(values, dtype=torch.float64)
    loss = discriminator_hinge(scores, -scores, "none")
    assert torch.equal(loss == 0, scores >= 1)
    assert (loss >= 0).all()


@given(SCORES)
def test_sum_and_mean_belong_to_each_other(values):
    scores = torch.tensor(values, dtype=torch.float64)
    for loss in (lambda r: discriminator_hinge(scores, 2 - scores, r), lambda r: generator_hinge(scores, r)):
        assert torch.allclose(loss("sum"), loss("none").sum())
        assert torch.allclose(loss("mean") * len(values), loss("sum"))


def test_the_hinge_by_hand():
    real, fake = torch.tensor([0.5, 3.0]), torch.tensor([-4.0, 0.25])
    assert discriminator_hinge(real, fake, "none").tolist() == [0.5, 1.25]
    assert generator_hinge(fake, "none").tolist() == [4.0, -0.25]


def test_another_reduction_is_refused():
    with pytest.raises(SettingError, match="reduction is 'avg', but must be one of mean, sum, none"):
        generator_hinge(torch.zeros(1), "avg")


def test_scores_of_other_shapes_are_not_broadcast():
    """``(n,)`` against ``(n, 1)`` would be n^2 pairs, whose sum is n times too large."""
    with pytest.raises(SettingError, match=r"fake is \(4, 1\), but must be scores of the shape of real, \(4,\)"):
        discriminator_hinge(torch.zeros(4), torch.zeros(4, 1), "sum")


def test_a_penalty_without_a_gradient_is_refused():
    with pytest.raises(SettingError, match="real is 'without gradient', but must be what required gradients"):
        gradient_penalty(nn.Linear(2, 1)(torch.zeros(3, 2)), torch.zeros(3, 2))
    real = torch.zeros(3, 2, requires_grad=True)
    with pytest.raises(SettingError, match="real is 'without gradient'"):
        gradient_penalty(torch.zeros(3), real)


@given(st.integers(1, 6), st.integers(1, 5), st.floats(0.01, 100), st.integers(0, 1000))
def test_the_penalty_of_a_linear_discriminator_is_half_gamma_its_squared_weight(rows, width, gamma, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(width, 1).double()
    real = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    loss = gradient_penalty(linear(real), real, gamma, "none")
    assert loss.shape == (rows,)
    assert torch.allclose(loss, gamma / 2 * linear.weight.square().sum())
    loss.mean().backward()
    assert torch.allclose(linear.weight.grad, gamma * linear.weight)


def test_the_penalty_sees_one_row_at_a_time():
    """A quadratic score ``|x|^4 / 4``: its gradient is ``|x|^2 x``, of another length in every row."""
    real = torch.tensor([[1.0, 0.0], [0.0, 2.0]], requires_grad=True)
    scores = real.square().sum(1).square() / 4
    assert gradient_penalty(scores, real, 2.0, "none").tolist() == [1.0, 64.0]
