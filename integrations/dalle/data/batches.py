"""What the two stages take a step's batch from where it is the next part of a stream; other sources draw theirs.

A stream's batch does not depend on the number of ranks, nor does what is random about its samples: BPE dropout and the
choice of those without captions come from each sample's own generator.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...scenes.draw import to_tensor
from ..context import Context, Source, Stream
from .order import Part

Encode = Callable[[list[str], np.random.Generator], Tensor]
"""Captions to text tokens ``(n, length)``, with the generator of BPE dropout."""


def pictures_at(stream: Stream, part: Part) -> Tensor:
    """Give the pictures of stage 1.

    Args:
        stream: where they come from.
        part: this rank's part of the step's batch.

    Returns:
        ``(part.count, 3, size, size)`` float32 in [0, 1].
    """
    return to_tensor(np.stack([sample.pixels for sample in stream.samples_at(part)]))


def text_and_pictures_at(stream: Stream, part: Part, encode: Encode, uncaptioned: float) -> tuple[Tensor, Tensor]:
    """Give the text tokens and the pictures of stage 2.

    Args:
        stream: where they come from.
        part: this rank's part of the step's batch.
        encode: turns captions into text tokens.
        uncaptioned: share of the batch whose caption is empty, in [0, 1).

    Returns:
        Text ``(part.count, length)`` int64 and pictures ``(part.count, 3, size, size)`` float32.
    """
    rows, pixels = [], []
    for sample in stream.samples_at(part):
        silent = sample.rng.random() < uncaptioned
        rows.append(encode(["" if silent else sample.caption], sample.rng))
        pixels.append(sample.pixels)
    return torch.cat(rows), to_tensor(np.stack(pixels))


def broken_of(source: Source, context: Context) -> list[str]:
    """Gather the names of all pictures that a rank could not decode; every rank calls it, and gets them all, sorted."""
    mine = list(source.broken) if isinstance(source, Stream) else []
    found: list[list[str] | None] = [mine]
    if context.world_size > 1:
        found = [None] * context.world_size
        dist.all_gather_object(found, mine)
    return sorted({name for names in found for name in names or ()})
