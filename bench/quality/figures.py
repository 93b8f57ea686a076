"""What is made of the runs: losses at equal steps, differences to exact averages, and losses at equal time."""

import bisect
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.lab.figures import Spread
from bench.quality.ways import EXACT, Way, parse

Record = Mapping[str, Any]
WINDOW = 0.1
"""The part of a run over which training losses are averaged."""


@dataclasses.dataclass(frozen=True)
class Clock:
    """When a run has taken its steps: first exact ones, then the others.

    Args:
        exact: seconds of an exact step.
        other: seconds of any other.
        exact_steps: how many are exact.
        steps: of the whole run.

    Example:
        >>> clock = Clock(exact=2.0, other=1.0, exact_steps=10, steps=100)
        >>> clock.seconds(15), clock.taken(25.9), clock.taken(1000.0)
        (25.0, 15, 100)
    """

    exact: float
    other: float
    exact_steps: int
    steps: int

    def seconds(self, taken: int) -> float:
        """When so many steps have been taken."""
        exact = min(taken, self.exact_steps)
        return exact * self.exact + (taken - exact) * self.other

    def taken(self, seconds: float) -> int:
        """Steps that have ended by then."""
        return bisect.bisect_right(range(1, self.steps + 1), seconds, key=self.seconds)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their ways and seeds alone.

    Args:
        task: of all of them.
        precision: of all of them.
        steps: of each.
        runs: records by label and seed.
    """

    task: str
    precision: str
    steps: int
    runs: Mapping[tuple[str, int], Record]

    @property
    def ways(self) -> list[Way]:
        """In the order of tables: the exact one, ranks as they grow, then those with something else about them."""
        found = {parse(label) for label, _ in self.runs}
        return sorted(found, key=lambda way: (way.late, way.passes == "alternate", way.halved, way.rank))

    def seeds(self, way: Way) -> list[int]:
        """With which it was run."""
        return sorted(seed for label, seed in self.runs if label == way.label)

    def held_out(self, way: Way) -> Spread:
        """Held-out loss in the end: least, mean and largest of the seeds."""
        return over_seeds(self.runs[way.label, seed]["held_out"] for seed in self.seeds(way))

    def away(self, way: Way, figure: str = "held_out") -> dict[int, float]:
        """By seed, by what part the loss is above that of exact averages with the same seed.

        Args:
            way: whose loss.
            figure: "held_out", or "train" for the mean over the end of the run.
        """
        exact = {seed: self._loss(EXACT, seed, figure) for label, seed in self.runs if label == EXACT}
        seeds = [seed for seed in self.seeds(way) if seed in exact]
        return {seed: self._loss(way.label, seed, figure) / exact[seed] - 1 for seed in seeds}

    def curve(self, way: Way) -> list[float | None]:
        """The mean over the seeds of what `smooth` gives."""
        curves = [smooth(self.runs[way.label, seed]["train"]) for seed in self.seeds(way)]
        return [None if None in step else statistics.fmean(step) for step in zip(*curves, strict=True)]

    def exact_steps(self, way: Way) -> int | None:
        """After how many steps exact averages had the smoothed training loss that the way ends with; None if never."""
        if Way() not in self.ways:
            return None
        end = self.curve(way)[-1]
        exact = enumerate(self.curve(Way()), 1)
        return next((step for step, loss in exact if None not in (loss, end) and loss <= end), None)

    def _loss(self, label: str, seed: int, figure: str) -> float:
        record = self.runs[label, seed]
        last = smooth(record["train"])[-1]
        return record["held_out"] if figure == "held_out" or last is None else last


def smooth(losses: Sequence[float]) -> list[float | None]:
    """After each step, the mean over the steps before it that are `WINDOW` of the run; None where there are fewer.

    Example:
        >>> smooth([8.0, 4.0, 2.0, 2.0])  # a tenth of so few steps is one
        [8.0, 4.0, 2.0, 2.0]
    """
    width = max(1, round(WINDOW * len(losses)))
    ends = range(1, len(losses) + 1)
    return [None if end < width else statistics.fmean(losses[end - width : end]) for end in ends]


def over_seeds(values: Iterable[float]) -> Spread:
    """Least, mean and largest.

    Example:
        >>> over_seeds([1.0, 2.0, 6.0])
        Spread(low=1.0, middle=3.0, high=6.0)
    """
    found = list(values)
    return Spread(min(found), statistics.fmean(found), max(found))


def groups(records: Iterable[Record]) -> list[Group]:
    """All groups among the records: by task, then the shorter runs first, then by precision as they were run."""
    found: dict[tuple[str, int, str], dict[tuple[str, int], Record]] = {}
    for r in records:
        if r["kind"] == "run":
            found.setdefault((r["task"], r["steps"], r["precision"]), {})[r["way"], r["seed"]] = r
    order = {key: place for place, key in enumerate(found)}
    keys = sorted(found, key=lambda key: (key[0], key[1], order[key]))
    return [Group(task, precision, steps, found[task, steps, precision]) for task, steps, precision in keys]


class Times:
    """Seconds of steps, by task and network.

    Args:
        records: those of runs are passed over; of two that measure the same, the later counts.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._seconds = {
            (r["task"], r["way"], r["megabits"]): statistics.median(r["seconds"])
            for r in records
            if r["kind"] == "times"
        }

    def limits(self, task: str) -> list[int | None]:
        """The networks over which it was timed."""
        return list(dict.fromkeys(limit for name, _, limit in self._seconds if name == task))

    def step(self, task: str, way: Way, megabits: int | None) -> float | None:
        """A step's seconds, once a late way compresses; None if that was not timed."""
        label = dataclasses.replace(way, late=False).label
        return self._seconds.get((task, label, megabits))

    def clock(self, group: Group, way: Way, megabits: int | None) -> Clock | None:
        """When the way's runs have taken their steps."""
        exact, other = (self.step(group.task, w, megabits) for w in (Way(), way))
        if exact is None or other is None:
            return None
        return Clock(exact, other, way.exact_steps(group.steps), group.steps)


def at_equal_time(group: Group, times: Times, megabits: int | None) -> dict[Way, tuple[int, float | None]]:
    """What every way has come to when the first of them has taken all its steps.

    Returns:
        By way, steps taken, and the training loss over the last `WINDOW` of a run's steps before; None if it has taken
        fewer than these.
    """
    clocks = {way: clock for way in group.ways if (clock := times.clock(group, way, megabits)) is not None}
    end = min((clock.seconds(group.steps) for clock in clocks.values()), default=0.0)
    taken = {way: clock.taken(end) for way, clock in clocks.items()}
    return {way: (steps, group.curve(way)[steps - 1] if steps else None) for way, steps in taken.items()}
