"""The laws of the relaxed categorical: its noise, its divergence, and what it becomes as the temperature falls."""

import math

import pytest
import torch
import torch.nn.functional as F
from distopt.integrations.tokenizers.relaxed import Relaxed
from hypothesis import given
from hypothesis import strategies as st


def of_logits(logits, **options):
    """A bottleneck whose logits are its input, and whose vectors are one-hot."""
    codes = logits.shape[1]
    relaxed = Relaxed(codes, codes, **options)
    with torch.no_grad():
        relaxed.to_logits.weight.copy_(torch.eye(codes))
        relaxed.to_logits.bias.zero_()
        relaxed.embedding.weight.copy_(torch.eye(codes))
    return relaxed


def test_gumbel_max_draws_from_the_categorical():
    """Within three standard deviations, of 200,000 draws."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    logits = p.log().reshape(1, 4, 1, 1).expand(2, 4, 100, 1000)
    relaxed = of_logits(logits, straight_through=True)
    drawn = relaxed(logits, generator=torch.Generator().manual_seed(0)).vectors.mean((0, 2, 3))
    assert ((drawn - p).abs() < 3 * (p * (1 - p) / 200_000).sqrt()).all()


def test_known_divergences():
    uniform = torch.zeros(3, 8, 2, 2)
    assert of_logits(uniform)(uniform).losses["kl"].item() == pytest.approx(0, abs=1e-5)
    sure = torch.zeros(3, 8, 2, 2)
    sure[:, 1] = 100
    assert of_logits(sure)(sure).losses["kl"].item() == pytest.approx(4 * math.log(8), rel=1e-5)


@given(st.integers(0, 2**31), st.integers(2, 20))
def test_divergence_is_that_of_q(seed, codes):
    logits = 3 * torch.randn(2, codes, 3, 3, generator=torch.Generator().manual_seed(seed))
    q = logits.double().softmax(1)
    expected = (q * (q.log() + math.log(codes))).sum((1, 2, 3)).mean().item()
    for temperature in (0.1, 2.0):
        found = of_logits(logits, beta=2.0, subpixels=10)(logits, temperature=temperature).losses["kl"].item()
        assert found == pytest.approx(0.2 * expected, rel=1e-4)


@given(st.integers(0, 2**31))
def test_weights_are_a_distribution_and_sharpen(seed):
    logits = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(seed))
    relaxed = of_logits(logits)
    soft, hard = (
        relaxed(logits, temperature=tau, generator=torch.Generator().manual_seed(1)).vectors for tau in (1.0, 1e-2)
    )
    assert torch.allclose(soft.sum(1), torch.ones(2, 3, 3), atol=1e-5)
    assert (hard.amax(1) >= soft.amax(1) - 1e-6).all()
    assert torch.equal(soft.argmax(1), hard.argmax(1))


def test_the_relaxed_loss_goes_to_the_hard_one_as_the_temperature_falls():
    torch.manual_seed(0)
    logits = 4 * torch.randn(64, 8, 3, 3)
    relaxed = of_logits(logits)
    target = F.one_hot(logits.argmax(1), 8).movedim(-1, 1).float()
    gaps = []
    for temperature in (1.0, 1 / 4, 1 / 16):
        drawn = relaxed(logits, temperature=temperature, generator=torch.Generator().manual_seed(1)).vectors
        noisy = F.one_hot(drawn.argmax(1), 8).movedim(-1, 1).float()
        gaps.append(abs((drawn - target).square().mean() - (noisy - target).square().mean()).item())
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.3 * gaps[0]


def test_sure_logits_draw_their_argmax():
    torch.manual_seed(0)
    logits = 20 * torch.randn(8, 16, 6, 6)
    drawn = of_logits(logits, straight_through=True)(logits).vectors.argmax(1)
    assert (drawn == logits.argmax(1)).float().mean() > 0.85


def test_straight_through_gives_one_code_and_the_soft_gradient():
    logits = torch.randn(2, 6, 3, 3).requires_grad_()
    weight = torch.randn(2, 6, 3, 3)
    gradients = []
    for straight in (False, True):
        relaxed = of_logits(logits, straight_through=straight)
        out = relaxed(logits, temperature=0.5, generator=torch.Generator().manual_seed(0)).vectors
        gradients.append(torch.autograd.grad((out * weight).sum(), logits)[0])
        assert torch.equal(out.detach(), F.one_hot(out.argmax(1), 6).movedim(-1, 1).float()) is straight
    assert torch.allclose(*gradients, atol=1e-6)


def test_the_push_is_zero_at_equal_use():
    logits = 50 * torch.eye(4).reshape(1, 4, 2, 2)
    out = of_logits(logits, usage=1.0)(logits)
    assert out.losses["usage"].item() == pytest.approx(0, abs=1e-5)
    same = torch.zeros(1, 4, 2, 2)
    same[:, 0] = 50
    assert of_logits(same, usage=1.0)(same).losses["usage"].item() == pytest.approx(math.log(4), rel=1e-4)


def test_start_leads_by_the_gain():
    torch.manual_seed(0)
    z = torch.randn(4, 5, 6, 6)
    relaxed = Relaxed(10, 5, gain=7.0)
    relaxed.start(z, torch.Generator().manual_seed(0))
    best = relaxed.to_logits(z.movedim(1, -1).flatten(0, 2)).topk(2, dim=1).values
    assert (best[:, 0] - best[:, 1]).mean().item() == pytest.approx(7.0, rel=1e-3)
