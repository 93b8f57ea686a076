"""The laws of the codebook that gradients move, and of the gradients that pass it."""

import pytest
import torch
import torch.nn.functional as F
from distopt.integrations.tokenizers import bottlenecks
from distopt.integrations.tokenizers.nearest import nearest
from distopt.integrations.tokenizers.rotation import rotated
from distopt.integrations.tokenizers.vq import VQ
from hypothesis import given
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**31)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(SEEDS, st.integers(1, 40), st.integers(2, 50), st.integers(1, 9), st.floats(-100, 100))
def test_nearest_is_the_argmin_of_distances(seed, n, codes, width, far):
    points, table = normal(seed, n, width) + far, normal(seed + 1, codes, width) + far
    exact = (points[:, None].double() - table.double()).square().sum(-1)
    chosen = exact.gather(1, nearest(points, table)[:, None])[:, 0]
    assert (chosen <= exact.min(1).values + 1e-3 * exact.max()).all()
    assert (chosen - exact.min(1).values).max() <= 1e-4 * (1 + abs(far))


def test_nearest_is_the_same_in_parts(monkeypatch):
    points, table = normal(0, 50, 3), normal(1, 7, 3)
    whole = nearest(points, table)
    monkeypatch.setattr("distopt.integrations.tokenizers.nearest._AT_ONCE", 15)
    assert torch.equal(nearest(points, table), whole)


def test_of_equals_the_first():
    assert nearest(torch.zeros(1, 2), torch.tensor([[5.0, 5.0], [0.0, 1.0], [1.0, 0.0]])).item() == 1


@given(SEEDS)
def test_straight_through_is_the_identity_backwards(seed):
    z = normal(seed, 2, 4, 3, 3).requires_grad_()
    vectors = VQ(8, 4, commitment_weight=0.0)(z).vectors
    gradient = normal(seed + 1, *vectors.shape)
    vectors.backward(gradient)
    assert torch.equal(z.grad, gradient)


@pytest.mark.parametrize("weights", [(1.0, 0.25), (0.5, 2.0)])
def test_each_loss_moves_its_own_side(weights):
    """The four gradients; weights on the wrong terms, or a detach on the wrong side, change one of them."""
    vq = VQ(8, 4, codebook_weight=weights[0], commitment_weight=weights[1])
    z = normal(0, 2, 4, 3, 3).requires_grad_()
    out = vq(z)
    chosen = F.embedding(out.indices, vq.table()).movedim(-1, 1)
    square = (z - chosen).square().mean()
    found = {}
    for name in ("codebook", "commitment"):
        grads = torch.autograd.grad(out.losses[name], (z, vq.embedding.weight), retain_graph=True, allow_unused=True)
        found[name] = grads
    assert found["codebook"][0] is None
    assert found["commitment"][1] is None
    assert torch.allclose(out.losses["codebook"], weights[0] * square)
    assert torch.allclose(out.losses["commitment"], weights[1] * square)
    both = torch.autograd.grad(square, (z, vq.embedding.weight))
    assert torch.allclose(found["codebook"][1], weights[0] * both[1], atol=1e-7)
    assert torch.allclose(found["commitment"][0], weights[1] * both[0], atol=1e-7)


def test_codes_get_nothing_from_the_decoder():
    vq = VQ(8, 4)
    vq(normal(0, 1, 4, 2, 2).requires_grad_()).vectors.sum().backward()
    assert vq.embedding.weight.grad is None


def test_a_step_moves_chosen_codes_alone():
    vq = VQ(8, 4)
    z = (vq.table()[0].detach() * 1.01).reshape(1, 4, 1, 1).expand(2, 4, 3, 3)
    before = vq.table().detach().clone()
    sum(vq(z).losses.values()).backward()
    with torch.no_grad():
        vq.embedding.weight -= 0.1 * vq.embedding.weight.grad
    moved = (vq.table() - before).abs().amax(1)
    assert moved[0] > 0
    assert not moved[1:].any()


@given(SEEDS, st.integers(1, 20), st.integers(2, 9))
def test_rotation_keeps_the_value_the_length_and_the_angle(seed, n, width):
    z, codes, gradient = (normal(seed + i, n, width) for i in range(3))
    z.requires_grad_()
    out = rotated(z, codes)
    assert torch.equal(out, codes)
    out.backward(gradient)
    scale = codes.norm(dim=1) / z.norm(dim=1)
    assert torch.allclose(z.grad.norm(dim=1), scale * gradient.norm(dim=1), rtol=1e-3)
    cosines = F.cosine_similarity(z.grad, z), F.cosine_similarity(gradient, codes)
    assert torch.allclose(*cosines, atol=2e-3)


def test_rotation_is_the_gradient_of_the_rotation():
    """R as the matrix of the paper, with R and lambda as constants."""
    z, code, gradient = normal(0, 1, 5), normal(1, 1, 5), normal(2, 1, 5)
    u, q = F.normalize(z), F.normalize(code)
    w = F.normalize(u + q)
    matrix = torch.eye(5) - 2 * w.T @ w + 2 * q.T @ u
    scale = code.norm() / z.norm()
    assert torch.allclose(scale * z @ matrix.T, code, atol=1e-5)
    z.requires_grad_()
    rotated(z, code).backward(gradient)
    assert torch.allclose(z.grad, scale * gradient @ matrix, atol=1e-5)


@pytest.mark.parametrize(("z", "code"), [([0.0, 0.0], [1.0, 0.0]), ([1.0, 0.0], [0.0, 0.0]), ([1.0, 0.0], [-1.0, 0.0])])
def test_rotation_stays_finite_where_there_is_no_direction(z, code):
    z = torch.tensor([z], requires_grad=True)
    rotated(z, torch.tensor([code])).sum().backward()
    assert z.grad.isfinite().all()


def test_the_option_reaches_the_gradient():
    z = normal(0, 2, 4, 3, 3).requires_grad_()
    bottlenecks.build("vq", 8, 4, rotation=True)(z).vectors.sum().backward()
    assert not torch.allclose(z.grad, torch.ones_like(z))


def test_k_means_start():
    centres = torch.tensor([[10.0, 0.0], [0.0, 10.0], [-10.0, 0.0]])
    z = (centres.repeat(12, 1) + 0.1 * normal(0, 36, 2)).reshape(1, 6, 6, 2).movedim(-1, 1)
    vq = VQ(3, 2)
    vq.start(z, torch.Generator().manual_seed(0))
    assert torch.cdist(vq.table(), centres).min(0).values.max() < 0.1
