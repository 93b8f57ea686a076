"""Top singular values against LAPACK's, where they lie apart, nearly coincide, coincide, and are zero."""

import pytest
import torch
from distopt.integrations.biggan.spectra import top_singular_values, top_singular_values_of
from distopt.integrations.biggan.spectral import normalise
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distopt.errors import SettingError


def _with_values(rows, columns, values, seed):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))[0]
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


def _check(weight, count=3):
    exact = torch.linalg.svdvals(weight.double().flatten(1))
    exact = torch.cat([exact, exact.new_zeros(count)])[:count]
    found = top_singular_values(weight, count)
    assert found.shape == (count,)
    assert (found - exact).abs().max() <= 1e-4 * exact[0]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.floats(1e-8, 1e8), st.integers(0, 1000))
def test_random_matrices(rows, columns, count, scale, seed):
    _check(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale, count)


@given(
    st.lists(st.sampled_from([1.0, 1 - 1e-7, 1 - 1e-5, 1 - 1e-3, 0.99, 0.9, 0.5, 1e-3, 0.0]), min_size=1, max_size=30),
    st.integers(0, 20),
    st.integers(0, 1000),
)
def test_values_that_nearly_or_quite_coincide(values, more, seed):
    _check(_with_values(len(values) + more, len(values), values, seed))


def test_a_large_flat_spectrum():
    _check(_with_values(300, 200, [1 - i * 1e-4 for i in range(200)], 0))


def test_kernels_are_read_as_the_normalisation_reads_them():
    kernel = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    _check(kernel)


def test_zero_and_not_finite():
    assert top_singular_values(torch.zeros(4, 5)).tolist() == [0.0, 0.0, 0.0]
    assert top_singular_values(torch.tensor([[1.0, torch.inf], [0.0, 1.0]])).isnan().all()


def test_it_leaves_no_trace():
    """No gradient, no graph, no random number, no step of the normalisation."""
    model = normalise(nn.Sequential(nn.Linear(4, 6), nn.Conv2d(1, 2, 3)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    values = top_singular_values_of(model)
    assert sorted(values) == ["0.weight", "1.weight"]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert not top_singular_values(model[0].parametrizations.weight.original).requires_grad


def test_what_cannot_be_is_refused():
    with pytest.raises(SettingError, match="count is 0"):
        top_singular_values(torch.ones(2, 2), 0)
    with pytest.raises(SettingError, match="of 1 dimensions"):
        top_singular_values(torch.ones(2))
