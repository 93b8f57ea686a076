"""The laws of finite scalar quantisation: its codes are a grid, and its indices count them."""

import math

import pytest
import torch
from distopt.integrations.tokenizers.fsq import FSQ, LEVELS, levels_for
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError

EVERY = st.lists(st.integers(2, 9), min_size=1, max_size=4).map(tuple)


@given(EVERY)
def test_codes_and_indices_are_one_to_one(levels):
    fsq = FSQ(2, 1, levels=levels)
    every = torch.arange(math.prod(levels)).reshape(1, 1, -1)
    vectors = fsq.lookup(every)
    assert torch.equal(fsq.indices_of(vectors), every)
    assert torch.unique(vectors[0, :, 0].T, dim=0).shape[0] == math.prod(levels)
    assert vectors.abs().max() <= 1


@given(EVERY, st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 100.0]))
def test_every_input_has_a_code_and_eval_is_the_round_trip(levels, seed, size):
    fsq = FSQ(2, 1, levels=levels).eval()
    z = size * torch.randn(2, len(levels), 3, 3, generator=torch.Generator().manual_seed(seed))
    out = fsq(z)
    assert 0 <= out.indices.min()
    assert out.indices.max() < math.prod(levels)
    assert torch.equal(fsq.lookup(out.indices), out.vectors)


@given(EVERY)
def test_all_codes_can_be_met(levels):
    fsq = FSQ(2, 1, levels=levels)
    line = torch.linspace(-8, 8, 400)
    for channel, number in enumerate(levels):
        z = torch.zeros(1, len(levels), 1, 400)
        z[0, channel, 0] = line
        assert fsq.encode(z).unique().numel() == number


@pytest.mark.parametrize("codes", sorted(LEVELS))
def test_indices_under_bfloat16_are_those_of_float32(codes):
    """vector-quantize-pytorch issues 107 and 114: indices beyond the end, and half of the codes never met."""
    fsq = FSQ(codes, 1)
    z = (3 * torch.randn(16, fsq.inputs, 16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    expected = fsq.encode(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = fsq(z)
        assert torch.equal(fsq.encode(z), expected)
        assert torch.equal(fsq.lookup(expected), out.vectors)
    assert torch.equal(out.indices, expected)
    assert out.indices.max() < fsq.codes
    assert out.vectors.dtype == torch.float32


def test_every_code_is_met_under_bfloat16():
    fsq = FSQ(2**12, 1)
    z = fsq.lookup(torch.arange(fsq.codes).reshape(1, 1, -1))
    half = fsq.levels.reshape(1, -1, 1, 1) // 2
    reach, offset = (fsq.levels - 1) * 1.001 / 2, torch.where(fsq.levels % 2 == 0, 0.5, 0.0)
    inner = (z * half + offset.reshape(1, -1, 1, 1)) / reach.reshape(1, -1, 1, 1)
    z = torch.atanh(inner.clamp(-0.999, 0.999)) - torch.atanh(offset / reach).reshape(1, -1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert fsq.encode(z).unique().numel() == fsq.codes


@given(EVERY)
def test_what_is_almost_nothing_is_the_code_of_nothing(levels):
    """The shift makes up for the offset of an even number of levels."""
    fsq = FSQ(2, 1, levels=levels)
    z = torch.tensor([-0.02, 0.0, 0.02]).reshape(1, 1, 1, 3).expand(1, len(levels), 1, 3)
    assert not fsq(z).vectors.any()


def test_gradient_is_that_of_the_bound():
    fsq = FSQ(2, 1, levels=(5,))
    z = torch.tensor([-1.0, 0.0, 0.4]).reshape(1, 1, 1, 3).requires_grad_()
    fsq(z).vectors.sum().backward()
    expected = (1 - torch.tanh(z).square()) * 2 * 1.001 / 2
    assert torch.allclose(z.grad, expected.detach())


@given(st.integers(2, 5000))
def test_levels_make_about_as_many_codes(codes):
    assert 0.7 * codes <= math.prod(levels_for(codes)) <= max(3, 1.1 * codes)


def test_bad_levels():
    with pytest.raises(SettingError, match=r"FSQ\.levels is 1, but must be a whole number from 2 to 256"):
        FSQ(8, 1, levels=(4, 1))
    with pytest.raises(SettingError, match="product"):
        FSQ(8, 1, levels=(256, 256, 256))
