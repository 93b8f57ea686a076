"""The off-diagonal penalty: its gradient is that of autograd, exactly and in full; it is blind to the rows' lengths."""

import pytest
import torch
from distopt.integrations.biggan.orthogonal import (
    add_penalty_gradient,
    off_diagonal,
    penalty,
    penalty_gradient,
    start_orthogonal,
)
from distopt.integrations.biggan.spectral import normalise
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=4)


@given(SHAPES, st.floats(1e-5, 10), st.integers(0, 1000))
def test_the_gradient_is_that_of_autograd(shape, beta, seed):
    torch.manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    penalty(weight, beta).backward()
    assert torch.allclose(penalty_gradient(weight, beta), weight.grad, rtol=1e-10, atol=1e-12)


@given(st.integers(1, 5), st.integers(5, 8), st.integers(0, 1000))
def test_orthogonal_rows_of_any_length_cost_nothing(rows, columns, seed):
    torch.manual_seed(seed)
    weight = nn.init.orthogonal_(torch.empty(rows, columns, dtype=torch.float64))
    weight = weight * torch.rand(rows, 1, dtype=torch.float64) * 5
    assert penalty(weight).item() < 1e-20
    assert penalty_gradient(weight).abs().max().item() < 1e-15


def test_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert off_diagonal(weight).tolist() == [[0.0, 3.0], [3.0, 0.0]]
    assert penalty(weight, 0.5).item() == 9.0
    assert penalty_gradient(weight, 0.5).tolist() == [[18.0, 0.0], [6.0, 12.0]]


def test_descending_it_makes_rows_orthogonal():
    torch.manual_seed(0)
    weight = torch.randn(4, 9)
    lengths = weight.norm(dim=1)
    for _ in range(300):
        weight -= penalty_gradient(weight, 0.01)
    assert off_diagonal(weight).abs().max() < 1e-3
    assert ((weight.norm(dim=1) / lengths) > 0.3).all()


def test_it_is_added_to_matrices_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2).requires_grad_(False))
    model(torch.randn(4, 3)).sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    add_penalty_gradient(model.parameters(), 0.1)
    changed = [
        p.grad is not None and not torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True)
    ]
    assert changed == [True, False, False, False, False, False]


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Linear(4, 6), nn.Conv2d(2, 5, 3), nn.Embedding(4, 7)])
def test_an_orthogonal_start(layer):
    start_orthogonal(layer)
    assert torch.allclose(torch.linalg.svdvals(layer.weight.flatten(1)), torch.ones(1), atol=1e-5)


def test_an_orthogonal_start_reaches_normalised_weights():
    layer = start_orthogonal(normalise(nn.Linear(6, 4)))
    original = layer.parametrizations.weight.original
    assert torch.allclose(torch.linalg.svdvals(original), torch.ones(1), atol=1e-5)
