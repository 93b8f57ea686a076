"""The ways of averaging gradients whose losses are compared."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

import torch

import distopt
from distopt.numerics.storage import StorageDtype

EXACT = "AllReduce"
LATE = 0.1
"""The part of a run that a late way averages exactly."""


@dataclasses.dataclass(frozen=True)
class Way:
    """One of them.

    Args:
        rank: of PowerSGD; 0 averages exactly.
        passes: "both" factors at every step, or one of them in turn ("alternate").
        late: whether the first steps, `LATE` of them, are averaged exactly.
        halved: whether factors travel in bfloat16: twice the rank at the same bytes.
        theirs: whether it is torch's hook, not distopt's reducer.

    Example:
        >>> Way().label, Way(4).label, Way(4, late=True).label, Way(4, passes="alternate").label
        ('AllReduce', 'rank 4', 'rank 4, late', 'rank 4, alternate')
        >>> Way(8, halved=True).label, Way(4, theirs=True).label
        ('rank 8, bf16 wire', "rank 4, torch's hook")
    """

    rank: int = 0
    passes: Literal["both", "alternate"] = "both"
    late: bool = False
    halved: bool = False
    theirs: bool = False

    @property
    def label(self) -> str:
        """Its name in records and tables."""
        if self.rank == 0:
            return EXACT
        more = ["late"] * self.late + ["alternate"] * (self.passes == "alternate") + ["bf16 wire"] * self.halved
        more += ["torch's hook"] * self.theirs
        return ", ".join([f"rank {self.rank}", *more])

    def exact_steps(self, steps: int) -> int:
        """How many of so many steps it averages exactly, at their beginning.

        Example:
            >>> Way().exact_steps(300), Way(4).exact_steps(300), Way(4, late=True).exact_steps(300)
            (300, 0, 30)
        """
        return steps if self.rank == 0 else round(LATE * steps) if self.late else 0

    def reducer(self, steps: int, kept: StorageDtype | None) -> distopt.AllReduce | distopt.PowerSGD:
        """Make its reducer, if it is distopt's.

        Args:
            steps: of the whole run.
            kept: what residuals and factors are kept in; None for float32.
        """
        if self.rank == 0:
            return distopt.AllReduce()
        return distopt.PowerSGD(
            self.rank,
            passes=self.passes,
            start_step=self.exact_steps(steps),
            residual_dtype=kept,
            factor_dtype=kept,
            wire_dtype=torch.bfloat16 if self.halved else None,
        )


def ways_of(
    ranks: Iterable[int],
    late: Iterable[int] = (),
    alternate: Iterable[int] = (),
    halved: Iterable[int] = (),
    theirs: Iterable[int] = (),
) -> list[Way]:
    """All that are chosen, the exact one first.

    Example:
        >>> [way.label for way in ways_of([1, 4], [4], [4], [8])]
        ['AllReduce', 'rank 1', 'rank 4', 'rank 4, late', 'rank 4, alternate', 'rank 8, bf16 wire']
    """
    found = [Way(), *(Way(rank) for rank in ranks), *(Way(rank, late=True) for rank in late)]
    found += [Way(rank, passes="alternate") for rank in alternate]
    found += [Way(rank, halved=True) for rank in halved]
    return found + [Way(rank, theirs=True) for rank in theirs]


def parse(label: str) -> Way:
    """The way of a label.

    Example:
        >>> parse("rank 4, late") == Way(4, late=True), parse("AllReduce") == Way()
        (True, True)
    """
    if label == EXACT:
        return Way()
    rank, *more = label.removeprefix("rank ").split(", ")
    passes = "alternate" if "alternate" in more else "both"
    return Way(int(rank), passes, "late" in more, "bf16 wire" in more, "torch's hook" in more)
