"""How much of a gradient is left when it is divided by the number of ranks in float16."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.scaling.network import Network, Text, losses
from bench.scaling.training import Size
from distopt.numerics.codecs import FloatCodec


def shares_flushed(text: Text, size: Size, worlds: Sequence[int], steps: int = 60) -> list[dict[str, Any]]:
    """Train in float32 for some steps, and average the next gradient over ranks in two ways.

    All ranks have the same gradient, so that its mean is itself.

    Returns:
        For each number of ranks: ``hook``, the share of numbers other than zero that ``fp16_compress_hook`` makes zero
        before the ranks' are added up; ``hook_subnormal``, those that keep fewer than 11 bits; ``cast``, the share that
        `distopt.Cast` delivers as zero.
    """
    torch.manual_seed(0)
    network = Network(size.width, size.branches)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, foreach=True)
    for step in range(steps + 1):
        optimizer.zero_grad()
        losses(network, text.batch(size.rows, step))[1].backward()
        if step < steps:
            optimizer.step()
    matrices = [p.grad.flatten() for branch in network.matrices() for p in branch if p.grad is not None]
    gradient = torch.cat(matrices)
    gradient = gradient[gradient != 0]
    records: list[dict[str, Any]] = []
    for world in worlds:
        sent = gradient.half().div_(world)
        subnormal = (sent.abs() < torch.finfo(torch.float16).tiny) & (sent != 0)
        shares = {"hook": sent == 0, "hook_subnormal": subnormal, "cast": average_by_cast(gradient, world) == 0}
        records.append({"world": world, **{name: share.double().mean().item() for name, share in shares.items()}})
    return records


def average_by_cast(gradient: Tensor, world: int) -> Tensor:
    """What ``distopt.Cast(torch.float16)`` delivers if all ranks have the same one-dimensional gradient.

    Each rank owns one of ``world`` pieces, which travels in float16 with a power of two of its own; its owner adds up
    what the ranks sent in float32, and the mean travels like that again.
    """
    codec = FloatCodec(torch.float16)
    pieces = functional.pad(gradient, (0, -gradient.numel() % world)).view(world, -1)
    for _ in range(2):  # the mean of equal numbers is one of them
        pieces = codec.decode(codec.encode(pieces, None), pieces.shape[1], pieces.dtype)
    return pieces.flatten()[: gradient.numel()]
