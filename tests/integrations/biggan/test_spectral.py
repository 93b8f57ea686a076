"""Spectral normalisation moves on when it is to, and stays otherwise."""

import copy

import pytest
import torch
from distopt.integrations.biggan.spectral import held, normalise, settle, weights
from torch import nn
from torch.nn.utils import parametrizations

from distopt.errors import SettingError


def _model():
    torch.manual_seed(0)
    return normalise(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)))


def _vectors(model):
    return [buffer.clone() for name, buffer in model.named_buffers() if name.endswith(("_u", "_v"))]


def _equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_power_iteration_a_pass_and_none_while_held():
    model = _model()
    with torch.no_grad():
        for _, weight in weights(model):
            weight.copy_(torch.randn_like(weight))
    before, pictures = _vectors(model), torch.randn(5, 2, 4, 4)
    with held(model):
        model(pictures)
        assert _equal(before, _vectors(model))
        assert model.training
    twin = copy.deepcopy(model)
    model(pictures)
    once = _vectors(model)
    assert not _equal(before, once)
    for norm in (m.parametrizations.weight[0] for m in (twin[0], twin[3])):
        norm._power_method(
            norm._reshape_weight_to_matrix(twin[0 if norm._u.numel() == 4 else 3].parametrizations.weight.original), 1
        )
    assert _equal(once, _vectors(twin))


def test_held_gives_the_same_gradient():
    """The gradient of one batch is the sum of those of its parts, where none of them moves the vectors."""
    torch.manual_seed(0)
    model = normalise(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))).double()
    batch = torch.randn(8, 5, dtype=torch.float64)
    with held(model):
        model(batch).sum().backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with held(model):
        for part in batch.split(2):
            model(part).sum().backward()
    assert all(torch.allclose(w, p.grad, rtol=1e-12) for w, p in zip(whole, model.parameters(), strict=True))


def test_held_restores_eval_mode():
    model = _model().eval()
    with held(model):
        pass
    assert not any(module.training for module in model.modules())


def test_settled_weights_have_norm_one():
    model = _model().eval()
    with torch.no_grad():
        for _, weight in weights(model):
            weight.copy_(torch.randn_like(weight))
    statistics = model[1].running_mean.clone()
    settle(model, 200)
    for layer in (model[0], model[3]):
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert torch.allclose(norm, torch.ones(()), atol=1e-4)
    assert torch.equal(model[1].running_mean, statistics)
    assert not any(module.training for module in model.modules())


def test_normalising_twice_is_normalising_once():
    model = _model()
    names = [name for name, _ in model.named_parameters()]
    normalise(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert [name for name, _ in weights(model)] == ["0.weight", "3.weight"]


@pytest.mark.parametrize(
    "layer", [nn.Linear(3, 4), nn.Conv1d(3, 4, 2), nn.Embedding(3, 4), nn.ConvTranspose1d(3, 4, 2),
              nn.ConvTranspose2d(3, 4, 2), nn.ConvTranspose3d(3, 4, 2)],
)  # fmt: skip
def test_every_kind_of_layer_is_normalised(layer):
    """Generators of other people are made of transposed convolutions, whose filters are the second dimension."""
    settle(normalise(layer), 200)
    weight = layer.eval().weight.detach()
    matrix = weight.transpose(0, 1) if isinstance(layer, nn.modules.conv._ConvTransposeNd) else weight
    assert torch.linalg.matrix_norm(matrix.flatten(1), 2).item() == pytest.approx(1, abs=1e-4)


def test_another_parametrisation_does_not_pass_for_this_one():
    layer = parametrizations.weight_norm(nn.Linear(5, 4))
    with torch.no_grad():
        layer.parametrizations.weight.original1.mul_(10)
    normalise(layer)
    settle(layer, 100)
    layer.eval()
    assert torch.linalg.matrix_norm(layer.weight.detach(), 2).item() == pytest.approx(1, abs=1e-4)


def test_the_older_normalisation_is_refused():
    model = nn.Sequential(nn.ReLU(), nn.utils.spectral_norm(nn.Linear(3, 3)))
    with pytest.raises(SettingError, match=r"the normalisation of 1 is 'one of torch\.nn\.utils', but must be one of"):
        normalise(model)
