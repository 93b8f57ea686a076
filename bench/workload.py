"""A model whose gradients are handed to it, and a ledger of what became of them."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.competitors import Attached

Gradients = Mapping[str, Tensor]

PATIENCE = 4
"""Steps for which a parameter may wait for its gradient."""


class Given(nn.Module):
    """Parameters whose gradients are chosen: the loss is the inner product of both.

    Args:
        shapes: of each parameter, by name.
        dtype: of all of them.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, gradients: Gradients) -> Tensor:
        """The loss; parameters that are not named stay unused."""
        products = [(parameter * gradients[n]).sum() for n, parameter in self.named_parameters() if n in gradients]
        return torch.stack(products).sum()


def noise(
    shapes: Mapping[str, Sequence[int]], rank: int, step: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Standard normal gradients, different on every rank and at every step."""
    generator = torch.Generator().manual_seed(100_003 * rank + step)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def delivered(model: DistributedDataParallel) -> dict[str, Tensor]:
    """A copy of what stands in ``.grad``, by name; zeros where there is nothing."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.module.named_parameters()
    }


class Ledger:
    """Keeps account of gradients: fed, delivered, and still owed.

    Whatever the compression, the mean over the ranks of what was fed equals what was delivered plus the mean of the
    residuals; what was delivered is the same on all ranks, bit for bit; it is finite; and no parameter that has a
    gradient step after step is delivered nothing, which would be to keep all of it.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.bad_steps = 0
        self._waits: dict[str, int] = {}
        self._balance: dict[str, Tensor] = {}
        self._fed: dict[str, Tensor] = {}
        self._digest = hashlib.sha256()

    def enter(self, fed: Gradients, received: Gradients) -> None:
        """Book one step of this rank."""
        self.steps += 1
        self.bad_steps += any(not bool(g.isfinite().all()) for g in received.values())
        for name, gradient in received.items():
            zero = torch.zeros(gradient.numel(), dtype=torch.float64)
            mine = fed[name].double().reshape(-1) if name in fed else zero
            self._fed[name] = self._fed.get(name, zero) + mine
            self._balance[name] = self._balance.get(name, zero) + mine - gradient.double().reshape(-1)
            self._waits[name] = 0 if gradient.any() or not mine.any() else self._waits.get(name, 0) + 1
            self._digest.update(gradient.contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    def lost(self, residuals: Gradients) -> float:
        """The part of the gradient that was neither delivered nor kept, relative to all that was fed. Collective.

        Args:
            residuals: mean over the ranks, by parameter name; a parameter that is not named keeps nothing.
        """
        missing, total = 0.0, 0.0
        for name, balance in self._balance.items():
            mean = torch.stack([balance, self._fed[name]]) / dist.get_world_size()
            dist.all_reduce(mean)
            difference = mean[0] - residuals[name].double().reshape(-1) if name in residuals else mean[0]
            missing += float(difference.square().sum())
            total += float(mean[1].square().sum())
        return (missing / total) ** 0.5

    def agreed(self) -> bool:
        """Whether all ranks were delivered the same bits. Collective."""
        digests: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(digests, self._digest.hexdigest())
        return len(set(digests)) == 1

    def starved(self) -> list[str]:
        """Parameters that have had a gradient but been delivered nothing for the last `PATIENCE` steps or more."""
        return [name for name, steps in self._waits.items() if steps >= PATIENCE]

    def close(self, attached: Attached) -> dict[str, Any]:
        """The account in numbers. Collective."""
        return {
            "steps": self.steps,
            "bad_steps": self.bad_steps,
            "starved": self.starved(),
            "agreed": self.agreed(),
            "lost": self.lost(attached.residuals()),
        }
