"""The laws of signs: indices are their bits, and the entropies are those of all codes written out."""

import math

import pytest
import torch
from distopt.integrations.tokenizers.lfq import LFQ
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_codes_and_indices_are_one_to_one(bits):
    lfq = LFQ(2**bits, 1)
    every = torch.arange(2**bits).reshape(1, 1, -1)
    vectors = lfq.lookup(every)
    assert torch.equal(lfq.encode(vectors), every)
    assert set(vectors.unique().tolist()) == {-1.0, 1.0}


@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from([0.1, 1.0, 10.0]))
def test_entropies_are_those_of_all_codes(seed, bits, temperature):
    lfq = LFQ(2**bits, 1, temperature=temperature)
    rows = torch.randn(20, bits, generator=torch.Generator().manual_seed(seed))
    codes = lfq.lookup(torch.arange(2**bits).reshape(1, 1, -1))[0, :, 0].T
    p = torch.softmax(-torch.cdist(rows.double(), codes.double()).square() / temperature, dim=1)
    sure, spread = lfq.entropies(rows)

    def entropy(q):
        return -torch.special.xlogy(q, q).sum(-1)

    assert sure.item() == pytest.approx(entropy(p).mean().item(), abs=1e-4)
    assert spread.item() == pytest.approx(entropy(p.mean(0)).item(), abs=1e-4)


def test_groups_bound_the_entropy_from_above():
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).cumsum(1)
    whole, parts = (LFQ(64, 1, entropy_bits=bits).entropies(rows)[1] for bits in (6, 2))
    assert whole < parts <= 6 * math.log(2)


def test_the_loss_makes_codes_sure_and_spread():
    """Descending it alone ends at one sure code a cell and all codes equally often."""
    torch.manual_seed(0)
    lfq = LFQ(8, 1, commitment_weight=0.0)
    z = (0.3 + 0.1 * torch.randn(4, 3, 4, 4)).requires_grad_()
    assert lfq.encode(z).unique().numel() == 1
    optimizer = torch.optim.Adam([z], 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        lfq(z).losses["entropy"].backward()
        optimizer.step()
    assert lfq.encode(z).unique().numel() == 8
    assert lfq(z).losses["entropy"].item() == pytest.approx(-0.1 * math.log(8), abs=0.02)


def test_gradients_of_each_loss():
    lfq = LFQ(8, 1)
    z = torch.randn(2, 3, 3, 3).requires_grad_()
    out = lfq(z)
    (gradient,) = torch.autograd.grad(out.losses["commitment"], z, retain_graph=True)
    assert torch.allclose(gradient, 0.5 * (z - out.vectors).detach() / z.numel())
    out.vectors.backward(torch.ones_like(z))
    assert torch.equal(z.grad, torch.ones_like(z))
