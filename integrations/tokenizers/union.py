"""Sums and rows over all ranks: a codebook that sees its own rank alone becomes another one on each of them.

Each function gives the same bits on every rank, and what it is given back without ``torch.distributed``.
Failures that this prevents: lucidrains/vector-quantize-pytorch pull requests 17 and 25, issues 105 and 222.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from .kmeans import kmeans


def ranks() -> int:
    """How many ranks there are; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(values: Tensor) -> Tensor:
    """The sum over all ranks; a new tensor."""
    total = values.clone()
    if ranks() > 1:
        dist.all_reduce(total)
    return total


def gathered(rows: Tensor) -> Tensor:
    """The rows ``(n, d)`` of all ranks, in the order of ranks; n may differ, d may not."""
    if ranks() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(ranks())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = max(int(count) for count in counts)
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), rows.shape[1])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def from_first(values: Tensor) -> Tensor:
    """The first rank's ``values``; a new tensor."""
    copy = values.clone()
    if ranks() > 1:
        dist.broadcast(copy, src=0)
    return copy


def picked(rows: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Draw ``number`` of all ranks' rows, with repetition.

    Args:
        rows: ``(n, d)``, this rank's; n may differ between ranks.
        number: how many.
        generator: on the CPU, in the same state on all ranks.

    Returns:
        ``(number, d)``: each comes from the one rank that has it, so nothing is rounded.
    """
    rank = dist.get_rank() if ranks() > 1 else 0
    counts = torch.zeros(ranks(), dtype=torch.int64, device=rows.device)
    counts[rank] = len(rows)
    counts = summed(counts).cpu()
    places = torch.randint(int(counts.sum()), (number,), generator=generator) - int(counts[:rank].sum())
    places = places.to(rows.device)
    ours = (places >= 0) & (places < len(rows))
    found = rows.new_zeros(number, rows.shape[1])
    found[ours] = rows[places[ours]]
    return summed(found)


def mean_of_all(rows: Tensor) -> Tensor:
    """The mean over all ranks' rows, with the gradient of this rank's part.

    DistributedDataParallel averages gradients over the ranks, which makes that of a function of this mean exact.

    Args:
        rows: ``(n, ...)``; n may differ between ranks, and be 0.

    Returns:
        ``(...)``.
    """
    if ranks() == 1:
        return rows.mean(0)
    total, number = summed(rows.detach().sum(0)), summed(rows.new_tensor(float(len(rows))))
    own = rows.sum(0) * (ranks() / number)
    return total / number + (own - own.detach())


@torch.no_grad()
def started(rows: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """``number`` k-means centres ``(number, d)`` of all ranks' rows, found by the first rank, for all."""
    everything = gathered(rows.detach().float())
    centres = everything.new_empty(number, rows.shape[1])
    if ranks() == 1 or dist.get_rank() == 0:
        centres = kmeans(everything.cpu(), number, generator=generator).to(rows.device)
    return from_first(centres)
