"""Truncation by drawing again: bounds, moments of the truncated normal, and what it leaves alone."""

import math

import pytest
import torch
from distopt.integrations.biggan.truncation import truncated_normal
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.floats(0.02, 5), st.integers(0, 50), st.integers(0, 1000))
def test_nothing_is_beyond_and_what_was_within_stays(threshold, rows, seed):
    free = truncated_normal(rows, 3, threshold=None, generator=_generator(seed))
    noise = truncated_normal(rows, 3, threshold=threshold, generator=_generator(seed))
    assert noise.shape == free.shape
    assert (noise.abs() <= threshold).all()
    within = free.abs() <= threshold
    assert torch.equal(noise[within], free[within])


@pytest.mark.parametrize(
    ("threshold", "variance"), [(0.25, 0.0207), (0.5, 0.0806), (1, 0.2911), (1.5, 0.5515), (2, 0.7737)]
)
def test_the_variance_is_that_of_the_truncated_normal(threshold, variance):
    noise = truncated_normal(400_000, threshold=threshold, generator=_generator())
    assert noise.var().item() == pytest.approx(variance, rel=0.02)
    assert abs(noise.mean().item()) < 0.01


def test_no_mass_on_the_threshold_and_the_right_shape_inside():
    """Clipping would put a third of it there; part of it within half the threshold as the normal has it."""
    noise = truncated_normal(200_000, threshold=1.0, generator=_generator(), dtype=torch.float64)
    assert (noise.abs() == 1).sum() == 0
    expected = math.erf(0.5 / math.sqrt(2)) / math.erf(1 / math.sqrt(2))
    assert (noise.abs() < 0.5).double().mean().item() == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 0.001, math.nan, "1"])
def test_too_small_a_threshold_is_refused(threshold):
    with pytest.raises(SettingError, match=r"threshold is .*, but must be None or a number of at least 0\.01"):
        truncated_normal(3, threshold=threshold)
