"""Standing statistics: means over passes, of models that are not ours, with everything else at rest."""

import pytest
import torch
from distopt.integrations.biggan.spectral import normalise
from distopt.integrations.biggan.standing import measure_statistics
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distopt.errors import SettingError


@given(st.integers(1, 6), st.integers(2, 7), st.integers(0, 1000))
def test_statistics_are_the_means_over_passes(passes, rows, seed):
    batches = torch.randn(passes, rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model = nn.Sequential(nn.BatchNorm1d(3)).double()
    model(batches[0] + 100)  # what was there before is forgotten
    stream = iter(batches)
    assert measure_statistics(model, lambda: model(next(stream)), passes) is model
    assert torch.allclose(model[0].running_mean, batches.mean((0, 1)))
    assert torch.allclose(model[0].running_var, batches.var(1).mean(0))
    assert model[0].momentum == 0.1
    assert not model.training
    assert not model[0].training


def test_all_else_rests():
    torch.manual_seed(0)
    model = nn.Sequential(normalise(nn.Linear(3, 4)), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    state = {name: value.clone() for name, value in model.state_dict().items() if "running" not in name}
    rows = torch.randn(6, 3)
    seen = []
    measure_statistics(model, lambda: seen.append(model[:2](rows)) or model(rows), passes=2)
    assert torch.equal(seen[0], seen[1])
    assert (seen[0] != 0).all()
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in state.items() if "tracked" not in name)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_fails_is_left_in_order():
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        measure_statistics(model, lambda: model(torch.zeros(1, 3, 2, 2)), 1)
    assert model[0].momentum == 0.1
    assert not model[0].training


def test_statistics_of_nothing_are_refused():
    """Means of no batch would be 0 and 1, without a word."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].running_mean.fill_(5.0)
    with pytest.raises(SettingError, match="passes is 0, but must be at least 1"):
        measure_statistics(model, lambda: model(torch.zeros(2, 3)), 0)
    assert (model[0].running_mean == 5).all()
    with pytest.raises(SettingError, match="draw is 'a function that meets no batch norm of the model'"):
        measure_statistics(model, lambda: None, 2)
