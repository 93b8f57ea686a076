"""A small training that a checkpoint has to carry on to the bit."""

import random

import numpy
import torch
from torch import nn

from distopt import checkpoint


class Training:
    """AdamW with a scheduler and dropout, on data drawn from every kind of generator."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4])
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        self.draws = torch.Generator().manual_seed(seed)
        self.progress = {"position": 0, "history": []}
        self.best = checkpoint.Value(float("inf"))

    def step(self):
        x = torch.randn(5, 3, generator=self.draws) * random.random() + float(numpy.random.random())
        loss = self.model(x + torch.rand(())).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.progress["position"] += 1
        self.progress["history"].append(loss.item())
        self.best.value = min(self.best.value, loss.item())

    def stateful(self):
        return vars(self)


def same(one, other):
    """Whether two states are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
