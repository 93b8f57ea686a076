"""Collapse as numbers."""

import pytest
import torch
from distopt.integrations.tokenizers.metrics import code_use, counts_of, psnr, quantisation_error
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(2, 100), st.integers(1, 50))
def test_uniform_and_constant(codes, times):
    uniform = code_use(torch.full((codes,), times))
    assert uniform.used == 1
    assert uniform.dead == 0
    assert uniform.perplexity == pytest.approx(codes, rel=1e-5)
    constant = code_use(counts_of(torch.full((times,), codes - 1), codes))
    assert constant.perplexity == 1
    assert constant.dead == codes - 1
    assert constant.used == pytest.approx(1 / codes)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=99))
def test_perplexity_is_at_most_the_codes_in_use(indices):
    use = code_use(counts_of(torch.tensor(indices), 10))
    assert 1 <= use.perplexity <= len(set(indices)) + 1e-5
    assert use.dead == 10 - len(set(indices))


def test_quantisation_error():
    z = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert quantisation_error(z, z) == 0
    assert quantisation_error(z, z.mean((0, 2, 3), keepdim=True).expand_as(z)) == pytest.approx(1, rel=1e-6)
    assert quantisation_error(10 * z, 10 * z + 1) == pytest.approx(quantisation_error(z, z + 0.1), rel=1e-4)


def test_psnr_of_nothing_wrong_is_a_number():
    assert psnr(0.0) == pytest.approx(120)
