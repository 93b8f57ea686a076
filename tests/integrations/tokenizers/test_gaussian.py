"""The laws of the Gaussian bottleneck: its divergence, its gradients, its weights."""

import pytest
import torch
from distopt.integrations.tokenizers.gaussian import Gaussian, kl_from_standard
from distopt.integrations.tokenizers.metrics import active_units
from hypothesis import given
from hypothesis import strategies as st

NUMBERS = st.floats(-3, 3)


@given(NUMBERS, NUMBERS)
def test_divergence_is_zero_at_the_prior_alone(mean, log_variance):
    kl = kl_from_standard(torch.tensor(mean, dtype=torch.float64), torch.tensor(log_variance, dtype=torch.float64))
    assert kl >= 0
    if abs(mean) > 1e-3 or abs(log_variance) > 1e-3:
        assert kl > 0


def test_known_divergences():
    assert kl_from_standard(torch.tensor(0.0), torch.tensor(0.0)) == 0
    assert kl_from_standard(torch.tensor(1.0), torch.tensor(0.0)) == 0.5


@pytest.mark.parametrize(("mean", "log_variance"), [(1.0, 0.5), (-0.5, -2.0), (2.0, 1.0)])
def test_divergence_is_the_mean_log_ratio(mean, log_variance):
    """By Monte Carlo, to a hundredth."""
    sigma = torch.tensor(log_variance / 2).exp()
    x = mean + sigma * torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    q, p = torch.distributions.Normal(mean, sigma), torch.distributions.Normal(0.0, 1.0)
    drawn = (q.log_prob(x) - p.log_prob(x)).mean()
    assert drawn.item() == pytest.approx(
        kl_from_standard(torch.tensor(mean), torch.tensor(log_variance)).item(), rel=0.01
    )


def test_draws_have_the_encoders_mean_and_variance():
    z = torch.cat([torch.full((1, 1, 300, 300), 2.0), torch.full((1, 1, 300, 300), -1.0)], dim=1)
    vectors = Gaussian(0, 1)(z, generator=torch.Generator().manual_seed(0)).vectors
    assert vectors.mean().item() == pytest.approx(2.0, abs=0.01)
    assert vectors.var().item() == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.02)


def test_gradients_reach_mean_and_log_variance_as_the_noise_says():
    z = torch.randn(2, 6, 4, 4).requires_grad_()
    vectors = Gaussian(0, 3)(z, generator=torch.Generator().manual_seed(0)).vectors
    vectors.sum().backward()
    mean = z.detach()[:, :3]
    into_mean, into_variance = z.grad.chunk(2, dim=1)
    assert torch.equal(into_mean, torch.ones_like(mean))
    # d(mu + sigma eps) / d ln sigma^2 = sigma eps / 2, eps a constant.
    assert torch.allclose(into_variance, (vectors.detach() - mean) / 2, atol=1e-6)


def test_sum_over_units_mean_over_batch_and_subpixels():
    z = torch.zeros(5, 4, 3, 3)
    z[:, :2] = 1.0
    assert Gaussian(0, 2)(z).losses["kl"].item() == pytest.approx(0.5 * 2 * 9)
    assert Gaussian(0, 2, beta=3.0, subpixels=9)(z).losses["kl"].item() == pytest.approx(3.0)


def test_warmup_and_free_bits():
    z = torch.zeros(5, 4, 3, 3)
    z[:, :2] = 1.0
    warm = Gaussian(0, 2, warmup=4)
    found = [warm(z).losses["kl"].item() for _ in range(6)]
    assert found == pytest.approx([0.0, 2.25, 4.5, 6.75, 9.0, 9.0])
    assert Gaussian(0, 2, free_bits=0.75)(z).losses["kl"].item() == pytest.approx(0.75 * 18)
    z.requires_grad_()
    Gaussian(0, 2, free_bits=0.75)(z).losses["kl"].backward()
    assert not z.grad.any()


def test_eval_is_the_mean():
    z = torch.randn(2, 6, 4, 4)
    assert torch.equal(Gaussian(0, 3).eval()(z).vectors, z[:, :3])


def test_extreme_variances_stay_finite():
    z = torch.tensor([0.0, 500.0, 0.0, -500.0]).reshape(2, 2, 1, 1)
    out = Gaussian(0, 1)(z)
    assert out.vectors.isfinite().all()
    assert out.losses["kl"].isfinite()


def test_active_units():
    means = torch.randn(100, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    means[:, 1] *= 0.05
    assert active_units(means) == 8
