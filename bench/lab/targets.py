"""The targets that distopt sets itself for the time of a step, and whether they are met."""

import dataclasses
from collections.abc import Iterator, Sequence

from bench.lab.figures import Figures, Record
from bench.lab.ways import PASSES, PLAIN, REPLICATED, powersgd

WORKLOAD, LAYOUT, RANK = "matrices", "replicated", 4
TORCH = next(label for label in REPLICATED if label.startswith("torch PowerSGD") and label.endswith(f" {RANK}"))
WIRE_FACTOR = 1.25
OF_TORCH = 0.6
SPEED_UP, SLOW_LINK = 30.0, 100
FAST_LINK = 1000
"""Megabits a second; exposed communication is judged up to here."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One of them.

    Args:
        way: whose it is.
        link: over which network.
        text: what is to be reached.
        measured: what was.
        met: whether that is enough.
    """

    way: str
    link: str
    text: str
    measured: str
    met: bool

    def line(self) -> str:
        """For a person."""
        verdict = "met" if self.met else "not met"
        return f"target ({self.way}, {self.link}): {self.text}; measured: {self.measured}: {verdict}"


def link_name(megabits: int | None) -> str:
    """In words.

    Example:
        >>> link_name(None), link_name(100), link_name(2500)
        ('no limit', '100 Mbit/s', '2.5 Gbit/s')
    """
    if megabits is None:
        return "no limit"
    return f"{megabits} Mbit/s" if megabits < 1000 else f"{megabits / 1000:g} Gbit/s"


def targets(records: Sequence[Record]) -> list[Target]:
    """All targets that the records decide, way by way; those for which a record is missing are left out."""
    figures = Figures(records)
    limits = dict.fromkeys(r["megabits"] for r in records if "seconds" in r and not r["alone"])
    return [
        target
        for passes in PASSES
        for megabits in sorted(limits, key=lambda limit: limit or 10**9, reverse=True)
        if (ours := figures.record(WORKLOAD, LAYOUT, powersgd(RANK, passes), megabits)) is not None
        for target in _of(ours, figures)
    ]


def _of(ours: Record, figures: Figures) -> Iterator[Target]:
    megabits = ours["megabits"]
    near = (ours["way"], link_name(megabits))
    place = (ours["workload"], ours["layout"])
    floor, exposed, compression = figures.floor(ours), figures.exposed(ours), figures.compression(ours)
    if floor is not None and megabits <= FAST_LINK and exposed is not None and compression is not None:
        allowed = WIRE_FACTOR * floor + compression.middle
        parts = (
            f"{WIRE_FACTOR} x {1e3 * floor:.1f} ms on the wire + {1e3 * compression.middle:.1f} ms compression alone"
        )
        text = f"exposed communication at most {1e3 * allowed:.1f} ms ({parts})"
        yield Target(*near, text, f"{exposed.text(1e3, 1)} ms", exposed.middle <= allowed)
    if (theirs := figures.record(*place, TORCH, megabits)) is not None:
        ratio = figures.ratio(ours, theirs)
        yield Target(*near, f"a step at most {OF_TORCH} x {TORCH}", f"{ratio.text(1, 2)} x", ratio.middle <= OF_TORCH)
    plain = figures.record(*place, PLAIN, megabits)
    if plain is not None and megabits == SLOW_LINK:
        gain = figures.ratio(plain, ours)
        text = f"at least {SPEED_UP:g} x as fast as plain DDP"
        yield Target(*near, text, f"{gain.text(1, 1)} x", gain.middle >= SPEED_UP)
    if plain is not None and megabits is None:
        ratio = figures.ratio(ours, plain)
        yield Target(*near, "a step no longer than plain DDP's", f"{ratio.text(1, 2)} x", ratio.middle <= 1)
