"""The laws of frozen codes under a learned map."""

import pytest
import torch
from distopt.integrations.tokenizers.simvq import SimVQ
from distopt.integrations.tokenizers.vq import VQ

OPTIONS = [{}, {"bias": False}, {"diagonal": True}, {"diagonal": True, "bias": False}, {"train_codes": True}]


def stepped(quantizer, z, steps=1):
    optimizer = torch.optim.SGD([p for p in quantizer.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(quantizer(z).losses.values()).backward()
        optimizer.step()


def cells_of_code_0(quantizer):
    return (quantizer.table()[0].detach() * 1.01).reshape(1, -1, 1, 1).expand(2, -1, 3, 3)


@pytest.mark.parametrize("options", OPTIONS)
def test_one_code_chosen_moves_every_code(options):
    torch.manual_seed(0)
    simvq = SimVQ(32, 8, **options)
    z, before = cells_of_code_0(simvq), simvq.table().detach().clone()
    assert not simvq.encode(z).any()
    stepped(simvq, z)
    assert ((simvq.table() - before).abs().amax(1) > 0).all()


def test_of_a_plain_codebook_it_moves_that_one():
    torch.manual_seed(0)
    vq = VQ(32, 8)
    z, before = cells_of_code_0(vq), vq.table().detach().clone()
    stepped(vq, z)
    moved = (vq.table() - before).abs().amax(1)
    assert moved[0] > 0
    assert not moved[1:].any()


def test_the_update_is_the_papers():
    """Under SGD with rate eta: change of e_i = -eta c_i . sum_j c_j^T dL/de_j, plus eta^2 terms of none: C is frozen."""
    torch.manual_seed(0)
    simvq = SimVQ(16, 4, bias=False)
    z = torch.randn(2, 4, 3, 3)
    codes, before = simvq.embedding.weight.clone(), simvq.table().detach().clone()
    table = before.clone().requires_grad_()
    indices = simvq.encode(z)
    chosen = table[indices].movedim(-1, 1)
    (chosen - z).square().mean().backward()
    stepped(simvq, z)
    expected = -0.1 * codes @ (codes.T @ table.grad)
    assert torch.allclose(simvq.table() - before, expected, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_frozen_codes_stay_to_the_bit(options):
    torch.manual_seed(0)
    simvq = SimVQ(32, 8, **options)
    before = simvq.embedding.weight.detach().clone()
    stepped(simvq, torch.randn(2, 8, 3, 3), steps=10)
    assert torch.equal(simvq.embedding.weight, before) is not options.get("train_codes", False)


@pytest.mark.parametrize("options", OPTIONS)
def test_merged_codes_give_the_same_indices(options):
    torch.manual_seed(0)
    simvq = SimVQ(32, 8, **options)
    stepped(simvq, torch.randn(2, 8, 3, 3), steps=10)
    z = torch.randn(4, 8, 6, 6)
    merged = simvq.merged()
    indices = simvq.encode(z)
    assert torch.equal(merged.encode(z), indices)
    assert torch.equal(merged.lookup(indices), simvq.lookup(indices))


@pytest.mark.parametrize("options", OPTIONS)
def test_start_gives_the_table_the_datas_mean_and_covariance(options):
    torch.manual_seed(0)
    simvq = SimVQ(20_000, 4, **options)
    mix = torch.tensor([[2.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.5, 0.1]])
    rows = torch.randn(5000, 4) @ mix + torch.tensor([5.0, 0.0, -1.0, 2.0])
    simvq.start(rows.reshape(50, 10, 10, 4).movedim(-1, 1), torch.Generator())
    table = simvq.table().detach()
    if options.get("bias", True):
        assert torch.allclose(table.mean(0), rows.mean(0), atol=0.1)
    if options.get("diagonal"):
        assert torch.allclose(table.std(0), rows.std(0), rtol=0.05)
    else:
        assert torch.allclose(table.T.cov(), rows.T.cov(), rtol=0.05, atol=0.15)
