"""Costs of blocks are measured on copies: nothing of the model changes."""

import copy

import torch
from torch import nn

from distopt.pipelining.costs import measure
from tests.pipelining.models import batch, blocks


class Heavy(nn.Module):
    """Does the same work many times over."""

    def __init__(self, times):
        super().__init__()
        self.inner, self.times = nn.Linear(64, 64), times

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.inner(x))
        return x


def test_what_works_more_costs_more():
    light, heavy = measure([Heavy(1), Heavy(60)], torch.randn(64, 64))
    assert 0 < light < heavy


def test_measuring_leaves_no_trace():
    model = blocks().append(nn.BatchNorm1d(5, dtype=torch.float64)).append(nn.Dropout())
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    seconds = measure(list(model), batch(0)[0])
    assert len(seconds) == len(model)
    assert min(seconds) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
