"""Dividing blocks into stages so that the slowest stage is as fast as can be."""

import itertools
import math
from collections.abc import Sequence


def partition(costs: Sequence[float], stages: int) -> list[range]:
    """Divide a row of blocks into consecutive stages, none of them empty, whose largest cost is the least possible.

    A pipeline is as slow as its slowest stage. Exact, by dynamic programming, in ``len(costs)² x stages`` steps. Of
    several best partitions it is the one whose last stages are the shortest, on every machine.

    Args:
        costs: of the blocks, 0 or more, in any unit.
        stages: from 1 to the number of blocks.

    Returns:
        Which blocks are in each stage.

    Example:
        >>> partition([1.0, 1.0, 1.0, 3.0], 2)
        [range(0, 3), range(3, 4)]
    """
    count = len(costs)
    sums = [0.0, *itertools.accumulate(costs)]
    best = [0.0, *([math.inf] * count)]  # the slowest stage of the first blocks, by their number
    cuts: list[list[int]] = []
    for _ in range(stages):
        following, begins = [math.inf] * (count + 1), [0] * (count + 1)
        for end in range(1, count + 1):
            slowest, begin = min((max(best[begin], sums[end] - sums[begin]), -begin) for begin in range(end))
            following[end], begins[end] = slowest, -begin
        best = following
        cuts.append(begins)
    parts: list[range] = []
    end = count
    for begins in reversed(cuts):
        parts.append(range(begins[end], end))
        end = begins[end]
    return parts[::-1]
