"""One run: what decides it, and what is kept of it."""

import dataclasses
from collections.abc import Sequence

from bench.quality.ways import Way

WORLD = 2
"""Ranks that train together."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What decides a run.

    Args:
        task: its name.
        way: to average gradients.
        precision: "fp32" or "bf16".
        seed: of weights and batches, the same for every way.
        steps: how many.
    """

    task: str
    way: Way
    precision: str
    seed: int
    steps: int

    @property
    def key(self) -> dict[str, object]:
        """The same as plain values, which records have."""
        return {**dataclasses.asdict(self), "way": self.way.label}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one rank knows of its run.

    Args:
        train: this rank's loss at each step.
        held_out: loss on what is never trained on, in the end; the same on all ranks.
        saving: fraction of bytes that was not sent.
        skipped: steps that the optimizer did not take.
    """

    train: Sequence[float]
    held_out: float
    saving: float
    skipped: int
