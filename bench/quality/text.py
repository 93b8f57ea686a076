"""A character-level transformer on the sources of Python's own library: its training on one of several ranks."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_hook
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distopt
from bench.lab.ways import ONE_BUCKET
from bench.lab.workloads import Gpt
from bench.quality.case import WORLD, Case, Outcome
from bench.scaling.network import CONTEXT, Text
from distopt.numerics.emulation import emulated_16bit
from distopt.numerics.storage import StorageDtype

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
    halves = case.precision == "bf16"
    ddp, saving = _averaging(model, case, torch.bfloat16 if halves else None)
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
    return Outcome(losses, held_out, saving(), 0)


def _averaging(model: nn.Module, case: Case, kept: StorageDtype | None) -> tuple[nn.Module, Callable[[], float]]:
    """The model, its gradients averaged, and what tells the fraction of bytes that is not sent."""
    if case.way.theirs:
        ddp = DistributedDataParallel(model, bucket_cap_mb=ONE_BUCKET)  # more, it does not survive on gloo
        state = torch_hook.PowerSGDState(None, matrix_approximation_rank=case.way.rank, start_powerSGD_iter=2)
        ddp.register_comm_hook(state, torch_hook.powerSGD_hook)
        return ddp, lambda: 1 - 1 / state.compression_stats()[0]
    ddp = DistributedDataParallel(model)
    registration = distopt.register(ddp, case.way.reducer(case.steps, kept))
    return ddp, lambda: registration.stats().saving
