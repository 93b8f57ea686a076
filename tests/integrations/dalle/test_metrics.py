"""Laws of the metrics, and slow or foreign implementations of the same."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from distopt.integrations.dalle.metrics import Moments, frechet_distance, psnr, ssim, unigram_loss
from hypothesis import given, settings
from hypothesis import strategies as st

CODES = 5
SEEDS = st.integers(0, 2**31)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(*parts):
    found = Moments()
    for part in parts:
        found.add(part)
    return found


def slow_ssim(x, y):
    """By the formulas of the paper, one window at a time."""
    side = min(11, x.shape[-1] - 1 + x.shape[-1] % 2)
    line = np.exp(-0.5 * ((np.arange(side) - side // 2) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for a, b in zip(x, y, strict=True):
        for top, left in itertools.product(range(x.shape[1] - side + 1), range(x.shape[2] - side + 1)):
            p, q = (part[top : top + side, left : left + side] for part in (a, b))
            mean_p, mean_q = (window * p).sum(), (window * q).sum()
            var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
            both = (window * (p - mean_p) * (q - mean_q)).sum()
            light = (2 * mean_p * mean_q + 1e-4) / (mean_p**2 + mean_q**2 + 1e-4)
            values.append(light * (2 * both + 9e-4) / (var_p + var_q + 9e-4))
    return float(np.mean(values))


@given(SEEDS, st.sampled_from([3, 8, 11, 14]))
@settings(max_examples=15, deadline=None)
def test_ssim_is_what_the_paper_says(seed, side):
    x = rand(1, 2, side, side, seed=seed)
    y = (x + 0.3 * rand(1, 2, side, side, seed=seed + 1)).clamp(0, 1)
    assert float(ssim(x, y)) == pytest.approx(slow_ssim(x[0].numpy(), y[0].numpy()), abs=1e-10)


@given(SEEDS, SEEDS)
@settings(max_examples=25, deadline=None)
def test_ssim_is_symmetric_and_one_for_equal_pictures_alone(one, two):
    x, y = rand(2, 3, 12, 12, seed=one), rand(2, 3, 12, 12, seed=two)
    assert torch.allclose(ssim(x, x), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(ssim(x, y), ssim(y, x))
    assert bool((ssim(x, y).abs() <= 1 + 1e-12).all())
    if one != two:
        assert bool((ssim(x, y) < 1 - 1e-6).all())
    assert torch.allclose(ssim(x.flip(-1), y.flip(-1)), ssim(x, y))
    assert torch.allclose(ssim(torch.cat([x, x]), torch.cat([y, y]))[2:], ssim(x, y))


def test_more_noise_is_further_from_the_picture():
    x, noise = 0.25 + 0.5 * rand(4, 3, 16, 16), rand(4, 3, 16, 16, seed=1) - 0.5
    noisy = [x + amount * noise for amount in (0.05, 0.1, 0.2, 0.5)]
    decibels = [psnr(float((x - y).square().mean())) for y in noisy]
    assert decibels == sorted(decibels, reverse=True)
    likeness = [float(ssim(x, y).mean()) for y in noisy]
    assert likeness == sorted(likeness, reverse=True)
    assert psnr(0.0) == math.inf
    assert psnr(1.0) == 0


@given(SEEDS, st.integers(2, 30), st.integers(1, 5), st.data())
@settings(max_examples=50, deadline=None)
def test_moments_do_not_depend_on_the_parts(seed, n, width, data):
    x = 100 + rand(n, width, seed=seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    parts = [x[a:b] for a, b in itertools.pairwise([0, *cuts, n])]
    found = moments(*parts)
    assert found.count == n
    assert np.allclose(found.mean, x.numpy().mean(0), atol=1e-10)
    assert np.allclose(found.covariance, np.cov(x.numpy().T).reshape(width, width), atol=1e-9)


@given(SEEDS, st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_the_distance_is_that_with_a_general_matrix_root(seed, width):
    x, y = rand(20, width, seed=seed), 1 + 2 * rand(25, width, seed=seed + 1)
    one, other = (np.atleast_2d(np.cov(z.numpy().T)) for z in (x, y))
    root = scipy.linalg.sqrtm(one @ other)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(one + other - 2 * np.real(root))
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(float(expected), rel=1e-6, abs=1e-9)


@given(SEEDS, SEEDS, st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_the_distance_is_a_distance(one, two, width):
    x, y = rand(12, width, seed=one), 3 * rand(12, width, seed=two)
    assert frechet_distance(moments(x), moments(x.flip(0))) == pytest.approx(0, abs=1e-7)
    there, back = frechet_distance(moments(x), moments(y)), frechet_distance(moments(y), moments(x))
    assert there == pytest.approx(back, abs=1e-7)
    assert there >= 0
    turned, _ = torch.linalg.qr(rand(width, width, seed=one + two))
    assert frechet_distance(moments(x @ turned + 5), moments(y @ turned + 5)) == pytest.approx(there, abs=1e-6)
    assert frechet_distance(moments(x), moments(x + 2)) == pytest.approx(4 * width, abs=1e-6)


def test_the_distance_of_gaussians_in_closed_form():
    """In one dimension (m1 - m2)^2 + (s1 - s2)^2, summed over independent dimensions."""
    scales = torch.tensor([[1.0, 2.0], [3.0, 0.5]], dtype=torch.float64)
    corners = torch.tensor([[a, b] for a in (-1, 1) for b in (-1, 1)], dtype=torch.float64) * math.sqrt(3 / 4)
    distance = frechet_distance(moments(corners * scales[0]), moments(7 + corners * scales[1]))
    assert distance == pytest.approx(2 * 49 + 2**2 + 1.5**2)


def test_fewer_pictures_than_features_are_no_trouble():
    x, y = rand(5, 40), rand(6, 40, seed=1)
    assert 0 < frechet_distance(moments(x), moments(y)) < math.inf


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 4), torch.full((2, 3), math.nan)])
def test_features_that_cannot_be_are_refused(wrong):
    found = moments(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="feature"):
        found.add(wrong)
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(found, moments(torch.zeros(1, 3)))


@given(st.lists(st.lists(st.integers(0, CODES - 1), min_size=3, max_size=3), min_size=1, max_size=20))
def test_the_baseline_is_never_below_the_entropy_of_what_it_was_fitted_to(rows):
    tokens = torch.tensor(rows)
    for columns in (tokens, tokens.reshape(-1, 1)):
        entropy = 0.0
        for column in columns.T:
            share = torch.bincount(column).double() / len(column)
            share = share[share > 0]
            entropy -= float((share * share.log()).sum()) / columns.shape[1]
        assert unigram_loss(columns, columns, CODES) >= entropy - 1e-9


def test_codes_never_seen_cost_no_infinity():
    loss = unigram_loss(torch.zeros(10, 1, dtype=torch.int64), torch.full((3, 1), 4), CODES)
    assert loss == pytest.approx(math.log(15))


def test_the_baseline_by_position_knows_the_position():
    tokens = torch.tensor([[0, 1]] * 50)
    assert unigram_loss(tokens, tokens, CODES) < 0.2
    assert unigram_loss(tokens.reshape(-1, 1), tokens.reshape(-1, 1), CODES) > 0.6
