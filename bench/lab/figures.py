"""What is made of measured steps: exposed communication, the floor of the wire, compression alone, ratios."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.lab.ways import NODE, NOOP

Record = Mapping[str, Any]
EMPTY = {NOOP, NODE}
"""Ways that average nothing between hosts: what others take beyond them is their communication."""


class Spread(NamedTuple):
    """A median and its quartiles."""

    low: float
    middle: float
    high: float

    def text(self, scale: float = 1.0, digits: int = 0) -> str:
        """All three, the median first.

        Example:
            >>> Spread(0.1, 0.25, 0.3).text(1000)
            '250 (100 to 300)'
        """
        low, middle, high = (f"{scale * value:.{digits}f}" for value in self)
        return f"{middle} ({low} to {high})"


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles.

    Example:
        >>> spread([3, 1, 2])
        Spread(low=1.5, middle=2.0, high=2.5)
    """
    return Spread(*(statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [*values]))


def floor_seconds(payload: float, ring: int, megabits: float, rings: int = 1) -> float:
    """The least time in which a host can send its part of an average: a ring's, the best that there is.

    Args:
        payload: bytes that each rank hands over, one copy.
        ring: ranks that average together.
        megabits: a second, that a host can send.
        rings: averages that share a host's link, one for each of its shards.

    Example:
        >>> floor_seconds(12.5e6, ring=2, megabits=100)  # as much as the payload, over a link of 12.5 MB/s
        1.0
        >>> floor_seconds(12.5e6, ring=4, megabits=100)
        1.5

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations", section 3.
    """
    return rings * 2 * (ring - 1) / ring * payload * 8 / (megabits * 1e6)


class Figures:
    """Looks figures up among the records of `bench.lab`.

    Args:
        records: as written; those without ``seconds`` are passed over.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._by_place = {_place(r): r for r in records if "seconds" in r}

    def record(self, workload: str, layout: str, way: str, megabits: int | None, alone: bool = False) -> Record | None:
        """One way's record, or None if it was not measured."""
        return self._by_place.get((workload, layout, way, megabits, alone))

    def step(self, record: Record) -> Spread:
        """Seconds of a step."""
        return spread(record["seconds"])

    def exposed(self, record: Record) -> Spread | None:
        """Seconds of a step beyond those of the step of the same round that averages nothing."""
        empty = self._empty(record)
        return None if empty is None else spread(_pairwise(record, empty, lambda own, other: own - other))

    def compression(self, record: Record) -> Spread | None:
        """The same with nobody to average with: what is left is the computing."""
        alone = self.record(record["workload"], record["layout"], record["way"], None, alone=True)
        return None if alone is None else self.exposed(alone)

    def floor(self, record: Record) -> float | None:
        """See `floor_seconds`; None without a limit, or where it is not known what is sent."""
        payload = statistics.median(record["payload"])
        if record["megabits"] is None or not payload:
            return None
        return floor_seconds(payload, record["ring"], record["megabits"], record["rings"])

    def ratio(self, record: Record, other: Record) -> Spread:
        """Steps of one way over those of another in the same round."""
        return spread(_pairwise(record, other, lambda own, theirs: own / theirs))

    def _empty(self, record: Record) -> Record | None:
        place = (record["workload"], record["layout"])
        found = (self.record(*place, way, record["megabits"], record["alone"]) for way in EMPTY)
        return next((empty for empty in found if empty is not None), None)


def _place(record: Record) -> tuple[str, str, str, int | None, bool]:
    return record["workload"], record["layout"], record["way"], record["megabits"], record["alone"]


def _pairwise(record: Record, other: Record, combine: Any) -> list[float]:
    return [combine(own, theirs) for own, theirs in zip(record["seconds"], other["seconds"], strict=True)]
