"""Clipping by the global norm equals torch's, whatever the norm is known from."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distopt
from distopt.attach.clipping import clip_
from tests.attach.models import batch, mlp, wrap
from tests.processes import run_ranks

REDUCERS = [
    distopt.PowerSGD(rank=2, min_saving=0.0),
    distopt.PowerSGD(rank=3, min_saving=0.0, passes="alternate"),
    distopt.PowerSGD(rank=2, min_saving=0.0, wire_dtype=torch.bfloat16),
    distopt.ByName({"0.*": distopt.PowerSGD(rank=2, min_saving=0.0)}, default=distopt.TopK(0.2)),
    distopt.AllReduce(),
]


def clip_job(rank, reducer, max_norm, loss_scale):
    model = wrap(mlp(3))
    registration = distopt.register(model, reducer)
    registration.set_loss_scale(loss_scale)
    rows = []
    for step in range(3):
        model.zero_grad()
        (model(batch(rank, step)).square().mean() * loss_scale).backward()
        for p in model.parameters():
            p.grad /= loss_scale
        expected = [p.grad.clone() for p in model.parameters()]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected))
        found = registration.clip_grad_norm_(max_norm)
        factor = min(1.0, max_norm / (norm + 1e-6))
        for g, p in zip(expected, model.parameters(), strict=True):
            torch.testing.assert_close(p.grad, g * factor, rtol=1e-5, atol=1e-9)
        rows.append((float(found), norm))
    return rows


@pytest.mark.parametrize("reducer", REDUCERS, ids=str)
def test_the_norm_of_what_was_averaged(reducer):
    first, second = run_ranks(2, clip_job, reducer, 0.05, 1024.0)
    assert [found for found, _ in first] == [found for found, _ in second]
    assert all(found == pytest.approx(norm, rel=1e-5) for found, norm in first)


def test_low_rank_norms_come_from_the_factors(alone):
    """No gradient of a compressed matrix is read: what is known is believed, whatever lies there."""
    model = mlp(3)
    registration = distopt.register(model.named_parameters(), distopt.PowerSGD(rank=2, min_saving=0.0))
    model(batch(0, 0)).square().mean().backward()
    registration.reduce()
    wanted = float(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.grad.mul_(100.0)
    assert float(registration.clip_grad_norm_(1e30)) == pytest.approx(wanted, rel=1e-5)


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6), st.floats(0.01, 100))
def test_equals_torch_s(values, max_norm):
    ours, theirs = nn.Parameter(torch.zeros(len(values))), nn.Parameter(torch.zeros(len(values)))
    ours.grad, theirs.grad = torch.tensor(values), torch.tensor(values)
    found = clip_({"p": ours.grad}, {}, max_norm)
    assert float(found) == pytest.approx(float(nn.utils.clip_grad_norm_([theirs], max_norm)))
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_dropped_step_has_no_norm(alone):
    model = mlp(3)
    registration = distopt.register(model.named_parameters(), distopt.PowerSGD(rank=2))
    (model(batch(0, 0)).sum() * math.nan).backward()
    registration.reduce()
    assert math.isnan(registration.clip_grad_norm_(1.0))
    with pytest.raises(distopt.SettingError, match="max_norm is 0, but must be a number above 0"):
        registration.clip_grad_norm_(0)
