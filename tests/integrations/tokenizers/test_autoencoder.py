"""The autoencoder's two halves, its weights of edges, its data, and its judge."""

import numpy as np
import pytest
import torch
from distopt.integrations.scenes.draw import Scenes
from distopt.integrations.tokenizers import bottlenecks
from distopt.integrations.tokenizers.autoencoder import Autoencoder, Shape, edge_weights
from distopt.integrations.tokenizers.data import DrawnScenes, Photos
from distopt.integrations.tokenizers.judging import exact_scenes, judge
from distopt.integrations.tokenizers.settings import NAMES
from torch import nn

from distopt.errors import SettingError


def made(name, codes=64, **options):
    torch.manual_seed(0)
    return Autoencoder(Shape(hidden=16), bottlenecks.build(name, codes, 8, **options))


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_fits(name):
    model = made(name)
    pictures = torch.rand(2, 3, 24, 24)
    shown, quantized = model(pictures)
    assert shown.shape == pictures.shape
    (shown.square().mean() + sum(quantized.losses.values())).backward()
    for parameter in model.parameters():
        assert not parameter.requires_grad or parameter.grad is not None


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gaussian"])
def test_tokens_are_all_that_eval_passes(name):
    model = made(name).eval()
    pictures = torch.rand(2, 3, 24, 24)
    indices = model.tokenize(pictures)
    assert indices.shape == (2, 6, 6)
    assert torch.equal(model.decode(indices), model(pictures)[0].detach().clamp(0, 1))


def test_a_token_is_of_its_own_patch():
    model = made("fsq").eval()
    pictures = torch.rand(1, 3, 24, 24)
    changed = pictures.clone()
    changed[:, :, 4:8, 8:12] = 1 - changed[:, :, 4:8, 8:12]
    z, other = model.encode(pictures), model.encode(changed)
    differs = (z != other).any(1)[0]
    assert differs[1, 2]
    assert differs.sum() == 1


def test_autocast_leaves_the_codes_float32():
    model = made("vq").eval()
    with torch.autocast("cpu", torch.bfloat16):
        shown, quantized = model(torch.rand(2, 3, 24, 24))
    assert shown.dtype == torch.bfloat16
    assert quantized.vectors.dtype == torch.float32
    assert torch.equal(model.bottleneck.lookup(quantized.indices), quantized.vectors)


def test_bad_grid():
    with pytest.raises(SettingError, match=r"Shape\.grid is 7, but must be a divisor of size, 24"):
        Shape(grid=7)


def test_edges():
    picture = torch.zeros(1, 3, 6, 6)
    picture[:, 1, :, 3:] = 1.0
    weights = edge_weights(picture, 2.0)[0, 0]
    assert weights.mean().item() == pytest.approx(1)
    assert torch.allclose(weights[:, 2:4] / weights[0, 0], torch.full((6, 2), 3.0))
    assert torch.equal(weights[:, [0, 1, 4, 5]], weights[0, 0].expand(6, 4))
    assert torch.equal(edge_weights(torch.zeros(1, 3, 6, 6), 2.0), torch.ones(1, 1, 6, 6))


@pytest.mark.parametrize("source", [DrawnScenes, Photos])
def test_sources_are_functions_of_their_generator(source):
    made = source()
    a, b = (made.training(5, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (5, 3, 24, 24)
    assert 0 <= a.min()
    assert a.max() <= 1
    assert not torch.equal(a, made.training(5, np.random.default_rng(4)))


def test_photographs_are_judged_by_other_parts():
    photos = Photos()
    ours, others = photos.training(400, np.random.default_rng(0)), photos.judged(400, np.random.default_rng(0))
    rows = {row.numpy().tobytes() for picture in ours for row in picture[:, :, :4].flatten(0, 1)}
    assert not any(
        row.numpy().tobytes() in rows
        for picture in others
        for row in picture[:, :, :4].flatten(0, 1)
        if row.std() > 0.05
    )


class Perfect(nn.Module):
    """Brings back what it is given, or nothing."""

    def __init__(self, keeps):
        super().__init__()
        self.keeps, self.unused = keeps, nn.Parameter(torch.zeros(1))

    def forward(self, pictures):
        return (pictures if self.keeps else torch.full_like(pictures, 0.5)), None


def test_exact_scenes_is_a_share():
    assert exact_scenes(Perfect(True), n=20) == 1
    assert exact_scenes(Perfect(False), n=20) == 0
    assert Scenes().size == Shape().size


def test_judging_by_hand():
    model = made("vq", codes=16).eval()
    source = DrawnScenes()
    found = judge(model, source, n=300, seed=5)
    rng = np.random.default_rng([5, 0x1D6E])
    judged, counted = [], []
    for size in (256, 44):
        judged.append(source.judged(size, rng))
        counted += [source.training(size, rng) for _ in range(4)]
    pictures, indices = torch.cat(judged), model.tokenize(torch.cat(counted))
    back = model.decode(model.tokenize(pictures))
    assert found["mse"] == pytest.approx((back - pictures).square().mean().item(), rel=1e-5)
    assert found["used"] == indices.unique().numel() / 16
    assert found["dead"] == 16 - indices.unique().numel()
    assert found["quantisation_error"] > 0
    assert found == judge(model, source, n=300, seed=5)


def test_a_continuous_one_has_active_units():
    found = judge(made("gaussian"), DrawnScenes(), n=64)
    assert found["units"] == 8 * 36
    assert 0 <= found["active_units"] <= 8 * 36
    assert "used" not in found
