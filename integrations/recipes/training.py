"""The loop of the runs: DDP, a registered reducer, windows of micro-batches, and nothing else."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distopt

from .settings import Study

Batch = TypeVar("Batch")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run computes: this rank among ``ranks``, on a device."""

    rank: int
    ranks: int
    device: torch.device


@dataclasses.dataclass(frozen=True)
class Drawn(Generic[Batch]):
    """This rank's micro-batches of a whole run; each is a pure function of seed, number and rank."""

    draw: Callable[[np.random.Generator], Batch]
    count: int
    seed: int
    rank: int

    def __iter__(self) -> Iterator[Batch]:
        return (self.draw(np.random.default_rng([self.seed, 1, index, self.rank])) for index in range(self.count))


def fit(
    model: nn.Module,
    draw: Callable[[np.random.Generator], Batch],
    loss: Callable[[nn.Module, Batch], Tensor | Mapping[str, Tensor]],
    settings: Study,
    place: Place,
    *,
    seed: int,
    groups: list[dict[str, Any]] | None = None,
    weight: Callable[[Batch], Any] | None = None,
    after: Callable[[int], None] | None = None,
) -> distopt.Stats:
    """Train ``model`` on all ranks together; every rank calls it.

    Args:
        model: with the same parameters on all ranks.
        draw: gives a micro-batch of this rank.
        loss: of the DDP model and a micro-batch: the sum, or sums by name, of what ``weight`` counts.
        settings: steps, learning rate, and how gradients are averaged.
        place: this rank.
        seed: decides every batch.
        groups: for the optimizer, if parameters differ in their rules.
        weight: see `distopt.accumulate`.
        after: called with the number of steps after each.

    Returns:
        What averaging has cost.
    """
    model.to(place.device).train()
    wrapped = DistributedDataParallel(model, device_ids=[place.device.index] if place.device.type == "cuda" else None)
    reducer = distopt.PowerSGD(rank=settings.rank) if settings.rank else distopt.AllReduce()
    registration = distopt.register(wrapped, reducer)
    optimizer = torch.optim.AdamW(
        groups or wrapped.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / settings.steps)
    )
    micros = Drawn(draw, settings.steps * settings.accumulate, seed, place.rank)
    windows: Iterable[distopt.Window[Batch]] = distopt.accumulate(
        micros, wrapped, steps=settings.accumulate, weight=weight
    )
    for step, window in enumerate(windows, start=1):
        for batch in window:
            window.backward(loss(wrapped, batch))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if after is not None:
            after(step)
    model.eval()
    return registration.stats()
