"""Learning by turns: a step of one network leaves nothing in the other."""

import pytest
import torch
from distopt.integrations.biggan.freezing import frozen
from torch import nn


def test_no_stray_gradients():
    torch.manual_seed(0)
    generator, critic = nn.Linear(2, 3), nn.Linear(3, 1)
    critic.bias.requires_grad_(False)
    with frozen(critic):
        critic(generator(torch.randn(4, 2))).sum().backward()
    assert all(p.grad is None for p in critic.parameters())
    assert all(p.grad is not None for p in generator.parameters())
    assert [p.requires_grad for p in critic.parameters()] == [True, False]


def test_it_ends_with_an_error_too():
    critic = nn.Linear(3, 1)
    with pytest.raises(RuntimeError), frozen(critic):
        critic(torch.zeros(2, 2))
    assert all(p.requires_grad for p in critic.parameters())
