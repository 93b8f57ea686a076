"""Adding up a few numbers over the ranks at agreed points of a loop, with an error where the loops differ.

A rank that fails on its way to such a point, because its data cannot be read for example, comes to it all the same and
says so: otherwise all others would wait for it.
"""

import itertools
import math
import weakref
from collections.abc import Mapping

import torch.distributed as dist

from distopt.comm.agreement import Facts, difference
from distopt.comm.communicator import Communicator
from distopt.errors import AgreementError
from distopt.numerics.fingerprint import digest

MOST_NUMBERS = 16
"""How many numbers can be added up at once. As many are always sent, so that ranks that disagree can still talk."""

_communicators: weakref.WeakKeyDictionary[dist.ProcessGroup, Communicator] = weakref.WeakKeyDictionary()


class Meeting:
    """Where ranks compare what they are about to do and add up their numbers: one all-gather of a fixed length.

    Args:
        communicator: over the ranks; None where torch.distributed is not initialised, and this process is alone.
        settings: what has to be the same on all ranks, by name. More may be added later.
        whose: they are, for messages.

    Example:
        >>> Meeting(None, {"steps": "4"}, "accumulate").gather("window 1", 3, {"tokens": 7.0})
        ([3], {'tokens': 7.0})
    """

    def __init__(self, communicator: Communicator | None, settings: dict[str, str], whose: str) -> None:
        self.settings = settings
        self.ranks = 1 if communicator is None else communicator.world_size
        """How many they are."""
        self.rank = 0 if communicator is None else communicator.ranks[communicator.rank]
        """This rank, by its number in the world."""
        self.step = 0
        """For messages: how many optimizer steps were begun."""
        self._communicator = communicator
        self._whose = whose

    def gather(
        self, place: str, count: int, numbers: Mapping[str, float], failure: Exception | None = None
    ) -> tuple[list[int], dict[str, float]]:
        """Tell how many there are of something here, and add up numbers. Collective.

        Args:
            place: which point of the loop this is; the same on all ranks.
            count: of whatever is counted, on this rank.
            numbers: up to `MOST_NUMBERS` by name. The settings tell which they are.
            failure: why this rank cannot go on.

        Returns:
            The count of every rank, and the sum of each number over the ranks, correctly rounded.

        Raises:
            AgreementError: on every rank, if settings or places differ; on all others, if one has a failure.
            Exception: this rank's ``failure``.
        """
        if self._communicator is None or self.ranks == 1:
            if failure is not None:
                raise failure
            return [count], dict(numbers)
        self._communicator.step = self.step
        facts = [*self.settings.items(), ("place", place)]
        mark = digest(*itertools.chain(*facts)) % 2**52  # a float64 holds as much
        mine = [mark, failure is not None, count, *(numbers[name] for name in sorted(numbers))]
        rows = self._communicator.gather_numbers([*mine, *[0.0] * (3 + MOST_NUMBERS - len(mine))])
        if any(row[:2] != [mark, 0.0] for row in rows):
            raise self._verdict(facts, failure)
        totals = {name: math.fsum(row[3 + i] for row in rows) for i, name in enumerate(sorted(numbers))}
        return [int(row[2]) for row in rows], totals

    def _verdict(self, facts: Facts, failure: Exception | None) -> Exception:
        """What is wrong, which every rank knows by now to be so."""
        assert self._communicator is not None
        told = None
        if failure is not None:
            first = (str(failure).splitlines() or [""])[0]
            ready = isinstance(failure, AgreementError)
            told = first if ready else f"rank {self.rank} cannot go on: {type(failure).__name__}: {first}"
        everyone = dict(zip(self._communicator.ranks, self._communicator.gather_objects((facts, told)), strict=True))
        failed = {rank: text for rank, (_, text) in everyone.items() if text is not None}
        if failure is not None:
            return failure
        if failed:
            return AgreementError(next(iter(failed.values())), list(failed))
        odd = difference({rank: theirs for rank, (theirs, _) in everyone.items()}, f"{self._whose}'s")
        return odd or AgreementError("the ranks differ in their loops, but tell the same about them")


def communicator_of(group: dist.ProcessGroup) -> Communicator:
    """The one communicator for meetings of a group's ranks, as each keeps connections open. Collective.

    Args:
        group: whose ranks meet. What meets them goes through the same points in the same order on all of them.
    """
    if group not in _communicators:
        _communicators[group] = Communicator(group)
    return _communicators[group]
