"""The bound is one: masses sum to 1, the KL divergence is exact, and no picture is likelier than it says."""

import itertools
import math

import pytest
import torch
from distopt.integrations.dalle.bounds import bits_per_dimension, bound, fitted_width, log_masses
from distopt.integrations.dalle.dvae import DVAE, DVAESettings
from distopt.integrations.dalle.measures import measure
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

LIKELIHOODS = ("mse", "logit_laplace")


def dvae(likelihood="mse", codes=3, grid=1, certain=1.0):
    torch.manual_seed(0)
    model = DVAE(DVAESettings(size=4, grid=grid, codes=codes, width=8, neck=4, likelihood=likelihood)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(certain)
    return model.requires_grad_(False)


def pictures(n, seed=0):
    return torch.randint(0, 256, (n, 3, 4, 4), generator=torch.Generator().manual_seed(seed)).float() / 255


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@given(st.integers(0, 2), st.floats(0.02, 0.5))
@settings(max_examples=20, deadline=None)
def test_masses_of_all_levels_sum_to_one(likelihood, code, width):
    levels = torch.arange(256).reshape(256, 1, 1, 1).expand(256, 3, 4, 4) / 255
    masses = log_masses(dvae(likelihood), levels, torch.tensor([[code]]).expand(256, -1), width).exp()
    assert torch.allclose(masses.sum(0), torch.ones(3, 4, 4, dtype=torch.float64), atol=1e-8)


def test_a_gaussians_masses_are_those_of_its_bins():
    model, seen, codes = dvae(), pictures(2), torch.tensor([[0], [2]])
    mean = model.render(torch.eye(3)[codes].reshape(2, 3, 1, 1)).double() * 0.5 + 0.5
    level = (255 * seen.double()).round() / 255
    expected = norm.cdf(level + 0.5 / 255, mean, 0.2) - norm.cdf(level - 0.5 / 255, mean, 0.2)
    inner = (seen > 0) & (seen < 1)
    found = log_masses(model, seen, codes, 0.2).exp()
    assert torch.allclose(found[inner], torch.as_tensor(expected)[inner], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_no_picture_is_less_likely_than_the_bound(likelihood):
    model, seen = dvae(likelihood, grid=2, certain=0.3), pictures(3)
    everything = torch.tensor(list(itertools.product(range(3), repeat=4)))
    masses = [log_masses(model, seen, codes.expand(3, -1), 0.3).sum((1, 2, 3)) for codes in everything]
    exact = torch.stack(masses).logsumexp(0) - 4 * math.log(3)
    terms = [bound(model, seen, generator(seed), 0.3) for seed in range(200)]
    nats = torch.stack([of.reconstruction + of.kl for of in terms]).mean(0)
    assert bool((-nats <= exact + 1e-3 * exact.abs()).all())
    log_q = model.encode(seen).flatten(2).transpose(1, 2).log_softmax(-1)
    expected = sum(
        (log_q.gather(2, codes.expand(3, -1).unsqueeze(-1)).sum((1, 2)).exp() * mass)
        for codes, mass in zip(everything, masses, strict=True)
    )
    drawn = torch.stack([of.reconstruction for of in terms]).mean(0)
    assert torch.allclose(drawn, -expected.double(), rtol=0.02)
    assert len({tuple(of.codes.flatten().tolist()) for of in terms}) > 100


def test_the_divergence_is_that_of_the_categorical():
    model, seen = dvae(codes=5, grid=2, certain=0.3), pictures(3)
    found = bound(model, seen, generator())
    q = model.encode(seen).softmax(1)
    uniform = torch.distributions.Categorical(probs=torch.full((5,), 0.2))
    for b in range(3):
        cells = [torch.distributions.Categorical(probs=q[b, :, i, j]) for i in range(2) for j in range(2)]
        kl = sum(torch.distributions.kl_divergence(cell, uniform) for cell in cells)
        assert float(found.kl[b]) == pytest.approx(float(kl), abs=1e-4)
        assert float(found.entropy[b]) == pytest.approx(float(sum(cell.entropy() for cell in cells)), abs=1e-4)
    assert bool((found.kl <= 4 * math.log(5)).all())


def test_repeating_pictures_changes_nothing(tiny_model):
    seen, captions = torch.rand(4, 3, 24, 24).mul(255).round() / 255, ["a red circle"] * 4
    certain = tiny_model.dvae.encode

    def sure(pictures, dtype=torch.float32):
        return certain(pictures, dtype) * 1e4

    tiny_model.dvae.encode = sure  # one code has all of q: draws are the same in every batch
    once, twice = measure(tiny_model, captions, seen, 0), measure(tiny_model, captions * 2, torch.cat([seen, seen]), 0)
    assert once.pop("n") * 2 == twice.pop("n")
    assert once.pop("bound") == pytest.approx(twice.pop("bound"), rel=1e-6)
    assert once == pytest.approx(twice, rel=1e-6)


def test_an_exact_decoder_costs_the_divergence_and_little_else():
    model, seen = dvae(certain=0.0), torch.full((2, 3, 4, 4), 128 / 255)
    found = bound(model, seen, generator(), fitted_width(model, seen))
    assert bits_per_dimension(float(found.reconstruction.mean()), 4) < 1.1
    assert torch.allclose(found.kl, torch.zeros(2), atol=1e-6)


def test_levels_drawn_at_random_have_eight_bits():
    assert bits_per_dimension(48 * math.log(256), 4) == pytest.approx(8)
