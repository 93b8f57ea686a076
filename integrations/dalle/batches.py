"""Which rows of a step's batch are a rank's, and what they are drawn from: the same batch for any number of ranks.

A batch is cut into chunks of eight rows, each with a generator of its own, which is a function of seed, stage, step and
chunk. A rank draws the chunks that its rows lie in, and keeps its rows. So one rank trains on what four ranks train on
together, and draws nothing that is not its own where its share is a multiple of eight.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from .context import Context

CHUNK = 8
"""Rows that are drawn together: one at a time would cost three times as much."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows that one generator draws.

    Args:
        rng: the generator.
        rows: how many to draw.
        kept: which of them are this rank's.
    """

    rng: np.random.Generator
    rows: int
    kept: slice


def chunks(context: Context, stage: int, step: int, batch: int) -> Iterator[Chunk]:
    """Give the chunks of ``step`` that this rank has rows of, in their order.

    Args:
        context: rank, ranks and seed.
        stage: number of the stage.
        step: counted from 0.
        batch: rows over all ranks, a multiple of their number; the ranks have equal shares, in their order.

    Example:
        >>> context = Context(rank=1, world_size=3)
        >>> [(chunk.rows, chunk.kept) for chunk in chunks(context, 2, 0, 36)]  # rows 12 to 23
        [(8, slice(4, 8, None)), (8, slice(0, 8, None))]
    """
    share = batch // context.world_size
    first, end = context.rank * share, (context.rank + 1) * share
    for number in range(first // CHUNK, -(-end // CHUNK)):
        start = number * CHUNK
        rows = min(CHUNK, batch - start)
        yield Chunk(context.rng(stage, step, number), rows, slice(max(0, first - start), min(rows, end - start)))
