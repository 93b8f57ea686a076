"""Optimizers and loops that people already have, around a registered DDP model."""

import pytest
import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

import distopt
from tests.attach.models import batch, mlp, parameters, same, wrap
from tests.processes import run_ranks


def train(model, optimizer, rank, steps=5):
    for step in range(steps):
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model)


def zero_job(rank, reducer, overlap):
    """Optimizer states shared out over the ranks, against every rank with its own."""
    ends = []
    for sharded in (True, False):
        model = wrap(mlp(4), gradient_as_bucket_view=overlap)
        registration = distopt.register(model, reducer, check_replicas_every=1)
        kind = torch.optim.Adam
        optimizer = (
            ZeroRedundancyOptimizer(model.parameters(), kind, lr=1e-3, parameters_as_bucket_view=overlap)
            if sharded
            else kind(model.parameters(), lr=1e-3)
        )
        ends.append(train(model, optimizer, rank))
        registration.check_replicas()
    return same(*ends)


@pytest.mark.parametrize("reducer", [distopt.AllReduce(), distopt.PowerSGD(rank=2)], ids=["AllReduce", "PowerSGD"])
@pytest.mark.parametrize("views", [False, True], ids=["copies", "views"])
def test_zero_redundancy_optimizer(reducer, views):
    assert all(run_ranks(3, zero_job, reducer, views))


def clipping_job(rank):
    """Clipping sees the averaged gradient, the same on every rank, and leaves residuals alone."""
    model = wrap(mlp(3))
    registration = distopt.register(model, distopt.PowerSGD(rank=2), check_replicas_every=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    norms = []
    for step in range(4):
        model(batch(rank, step)).square().mean().backward()
        before = registration.stats().residual_norm
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)))
        assert registration.stats().residual_norm == before
        optimizer.step()
        optimizer.zero_grad()
    registration.check_replicas()
    return norms


def test_clipping_and_weight_decay():
    first, second = run_ranks(2, clipping_job)
    assert first == second
    assert min(first) > 0.01
