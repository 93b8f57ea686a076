"""What trials are drawn from: a number is a seed, a seed is a trial, and the same on every rank."""

import os
import random
from collections.abc import Sequence

import torch
from torch import nn

import distopt
from distopt.reducers.reducer import Reducer

WIDTH = 24


def count(quick: int, full: int) -> int:
    """How many trials: a sample in ``make test``, all of them in ``make test-full``."""
    return full if os.environ.get("DISTOPT_TESTS") == "full" else quick


def powersgd(chance: random.Random) -> distopt.PowerSGD:
    """PowerSGD with settings of every kind."""
    basis = chance.choice(["warm", "warm", "fixed", "fresh"])
    return distopt.PowerSGD(
        rank=chance.choice([1, 2, 4, 0.1]),
        basis=basis,
        passes=chance.choice(["both", "alternate"]) if basis == "warm" else "both",
        start_step=chance.choice([0, 0, 1]),
        residual_dtype=chance.choice([None, None, torch.bfloat16, torch.float16, "1-6-9"]),
        factor_dtype=chance.choice([None, None, torch.bfloat16, "1-6-9"]),
        wire_dtype=chance.choice([None, None, torch.bfloat16, torch.float16]),
        seed=chance.randrange(100),
    )


def reducer(chance: random.Random, world: int) -> Reducer:
    """Any reducer; PowerSGD most often."""
    choices = [
        *[powersgd(chance) for _ in range(4)],
        distopt.TopK(0.05),
        distopt.RandomK(0.05, seed=3),
        distopt.Quantize(bits=chance.choice([4, 8])),
        distopt.Sign(),
        distopt.Cast(chance.choice([torch.float16, torch.bfloat16])),
        distopt.ByName({"*0.weight": powersgd(chance), "*1.weight": distopt.TopK(0.1)}, default=distopt.AllReduce()),
        distopt.AllReduce(),
    ]
    if world == 4:
        choices.append(distopt.Hierarchical(distopt.AllReduce(), powersgd(chance), ranks_per_node=2))
    return chance.choice(choices)


def net(layers: int, seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers of one size, a norm, and a frozen scale; the same weights on every rank."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    parts.append(nn.LayerNorm(WIDTH))
    model = nn.Sequential(*parts).to(dtype)
    model[-1].bias.requires_grad_(False)
    return model


def batch(rank: int, step: int, dtype: torch.dtype = torch.float32, rows: int = 4) -> torch.Tensor:
    """A rank's input at a step."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(rows, WIDTH, generator=generator).to(dtype)


def loss(outputs: torch.Tensor, step: int) -> torch.Tensor:
    """Something to be made small, not the same at every step."""
    generator = torch.Generator().manual_seed(step)
    return (outputs.float() - torch.randn(WIDTH, generator=generator)).square().mean()


def chunks(total: int, size: int) -> Sequence[range]:
    """Trials that share one world of processes, which costs more to start than they do."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]
