"""Windows of micro-batches of a sharded model equal the big batch, though its ranks have different numbers of them."""

import torch

import distopt
from tests.processes import run_ranks
from tests.sharding.models import Model, loss_of, optimizer_of, sharded, tokens, whole, worst

COUNTS = (5, 2)
"""Micro-batches of each rank; windows of two: the second one has none left, then neither has the first two."""


def loader_of(rank):
    return [tokens(rank, i, rows=1 + (rank + i) % 3) for i in range(COUNTS[rank])]


def windows_job(rank, shape):
    model, registration = sharded(shape, distopt.AllReduce())
    optimizer = optimizer_of(model)
    losses = []
    for window in distopt.accumulate(loader_of(rank), model, steps=2, weight=lambda batch: batch.numel()):
        for batch in window:
            window.backward(loss_of(model, batch, "sum"))
        losses.append(window.loss())
        optimizer.step()
        optimizer.zero_grad()
    assert registration.stats().steps == 3
    return losses, whole(model)


def test_windows_equal_the_big_batch():
    model = Model()
    optimizer, losses = optimizer_of(model), []
    for window in range(3):
        batches = [loader_of(rank)[2 * window : 2 * window + 2] for rank in range(2)]
        loss = loss_of(model, torch.cat([batch for own in batches for batch in own]))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for shape in ((1, 2), (2, 1)):
        for found, parameters in run_ranks(2, windows_job, shape):
            torch.testing.assert_close(found, losses)
            assert worst(parameters, whole(model)) < 1e-13
