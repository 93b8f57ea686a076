"""How much of the reduction hides behind backward: a step, played through.

There are two threads. The main one goes forward and backward, and finishes one bucket of gradients after another. The
worker takes the buckets in their order: it computes, waits for the wire, computes, and so on. What both of them compute
at the same time shares one processor; waiting for the wire takes nothing of it. When the last bucket is through, the
worker writes the outcome of all of them.
"""

import dataclasses
from collections.abc import Sequence

FORWARD = 1 / 3
"""Part of forward and backward that forward takes: a linear layer needs one product forward and two backward."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one bucket takes.

    Args:
        nbytes: of its gradients: how much of backward it stands for.
        stages: seconds of computing, then seconds on the wire, in turn.
        after: seconds of computing when all buckets are through.
    """

    nbytes: float
    stages: Sequence[tuple[float, float]]
    after: float = 0.0

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return sum(computing + wire for computing, wire in self.stages) + self.after


def step_seconds(compute_seconds: float, buckets: Sequence[Work]) -> float:
    """Play a step through.

    Args:
        compute_seconds: forward and backward alone.
        buckets: in the order in which backward finishes them; it takes as long for each as it has bytes.

    Returns:
        Seconds from the beginning of forward until all gradients are averaged.

    Example:
        >>> step_seconds(0.3, [Work(1.0, [(0.0, 0.05)]), Work(1.0, [(0.0, 0.05)])])
        0.35
        >>> step_seconds(0.0, [Work(1.0, [(0.0, 0.05)])])
        0.05
    """
    total, whole = sum(work.nbytes for work in buckets), compute_seconds
    now = done = passed = 0.0
    for work in buckets:
        passed += work.nbytes
        ready = whole * (FORWARD + (1 - FORWARD) * passed / total) if total else whole
        if done < ready:  # the worker waits
            now += ready - done
            done = ready
        for computing, wire in work.stages:
            # Both compute, each at half the speed, until one of them is through.
            shared = min(whole - done, computing)
            now += shared + computing
            done += shared
            now, done = now + wire, min(whole, done + wire)
    return now + (whole - done) + sum(work.after for work in buckets)
