"""A character-level transformer on the sources of Python's own library: its training on one of several ranks."""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distopt
from bench.lab.workloads import Gpt
from bench.quality.case import WORLD, Case, Outcome
from bench.scaling.network import CONTEXT, Text
from distopt.numerics.emulation import emulated_16bit

WIDTH, BRANCHES = 128, 4
ROWS = 8
"""Windows of a batch on each rank."""
HELD_OUT = 256
"""Windows from other files, always the same."""
LEARNING_RATE, WARMUP, CLIP = 2e-3, 0.1, 1.0
_SEED_OF_HELD_OUT = 10**9


class Characters(Gpt):
    """Predicts the next byte, and gives the loss. Two layers with learned places."""

    def __init__(self) -> None:
        super().__init__(WIDTH, BRANCHES)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        for embedding in (self.symbols, self.places):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, symbols: Tensor) -> Tensor:
        """The loss for integers ``(rows, length + 1)``."""
        x = self.symbols(symbols[:, :-1]) + self.places.weight[: symbols.shape[1] - 1]
        for branch in self.branches:
            x = x + branch(x)
        return functional.cross_entropy(self.lm_head(x).flatten(0, 1).float(), symbols[:, 1:].flatten())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """What the task is trained with."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def learning_rate_at(step: int, steps: int) -> float:
    """Rises over the first part of the run, and stays: a run that is cut short is as good as a short one.

    Example:
        >>> [learning_rate_at(step, 20) for step in (0, 1, 19)]
        [0.001, 0.002, 0.002]
    """
    return LEARNING_RATE * min(1.0, (step + 1) / max(1, round(WARMUP * steps)))


def train(rank: int, case: Case) -> Outcome:
    """One run on this rank. Collective."""
    text = Text()
    torch.manual_seed(case.seed)
    model = Characters()
    ddp = DistributedDataParallel(model)
    halves = case.precision == "bf16"
    reducer = case.way.reducer(case.steps, torch.bfloat16 if halves else None)
    registration = distopt.register(ddp, reducer)
    optimizer = optimizer_of(model)
    losses: list[float] = []
    for step in range(case.steps):
        batch = text.batch(ROWS, (case.seed * 10**6 + step) * WORLD + rank)
        with emulated_16bit() if halves else contextlib.nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=halves):
                loss = ddp(batch)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, case.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        held_out = model(text.batch(HELD_OUT, _SEED_OF_HELD_OUT, judge=True)).item()
    return Outcome(losses, held_out, registration.stats().saving, 0)
