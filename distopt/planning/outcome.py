"""A plan: what is predicted, what is chosen, and both in words."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import torch

from distopt.planning.costs import Estimate
from distopt.planning.foreseen import Way
from distopt.planning.machine import Network, Processor
from distopt.planning.quantities import bytes_in_words, in_words
from distopt.reducers.allreduce import AllReduce
from distopt.reducers.reducer import Reducer

_SHOWN = 12
"""Groups of gradients that a table has room for; the smallest are added up."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """How one gradient is to be sent. Bytes are those that a rank hands over, seconds those that depend on its size.

    Args:
        name: the parameter's.
        shape: of the gradient; of this rank's piece, if the model is sharded.
        dtype: of the gradient.
        way: ``"whole"``, ``"16 bits"``, or the rank of its factors.
        bytes_before: under plain DDP.
        bytes_after: in the plan.
        seconds_before: of its transfer, under plain DDP, hidden behind backward or not.
        seconds_after: of its compression and transfer, likewise.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    way: Way
    bytes_before: int
    bytes_after: float
    seconds_before: float
    seconds_after: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is predicted of a training step, and what it speaks for. ``str`` of it is a table.

    Args:
        network: what was assumed of the link.
        processor: what was assumed of the computing.
        compute_seconds: of forward and backward alone.
        plain: DDP by itself.
        chosen: what is best, which may be plain DDP.
        estimates: of all that was compared, by label.
        choices: one for each gradient, in the order of the model.
        reason: for the choice, in a sentence.
    """

    network: Network
    processor: Processor
    compute_seconds: float
    plain: Estimate
    chosen: Estimate
    estimates: Mapping[str, Estimate]
    choices: Sequence[Choice]
    reason: str

    @property
    def helps(self) -> bool:
        """Whether compressing is worth it; if not, the plan is to leave DDP alone."""
        return self.chosen is not self.plain

    @property
    def expected_saving(self) -> float:
        """Fraction of a step's time that the plan is expected to save."""
        before = self.plain.step_seconds
        return 1 - self.chosen.step_seconds / before if before else 0.0

    @property
    def saving(self) -> float:
        """Fraction of the bytes that are not sent, as `Stats.saving`."""
        before = self.plain.nbytes
        return 1 - self.chosen.nbytes / before if before else 0.0

    @property
    def seconds(self) -> Mapping[str, float]:
        """The predicted step of everything that was compared, by label."""
        return {label: estimate.step_seconds for label, estimate in self.estimates.items()}

    def reducer(self) -> Reducer:
        """What to give to `register`, or to `shard`; ``AllReduce()`` where compressing would not help."""
        return self.chosen.scheme.reducer or AllReduce()

    def __str__(self) -> str:
        return _text_of(self)


def _text_of(plan: Plan) -> str:
    """Lay out a plan: what was assumed, what is chosen for each group of gradients, and what else was compared."""
    chosen, network = plan.chosen, plan.network
    nodes = f" on {network.world_size // network.ranks_a_node} nodes" if network.ranks_a_node > 1 else ""
    copies = f", {network.peers} copies of the model" if network.sharded else ""
    rate = "no limit" if math.isinf(network.bandwidth) else f"{bytes_in_words(network.bandwidth)}/s"
    processor = plan.processor
    lines = [
        f"{'compress' if plan.helps else 'off'}: {plan.reason}",
        f"{network.world_size} ranks{nodes}{copies}; {rate} out of a node, {in_words(network.latency)} a message",
        f"compressing at {bytes_in_words(processor.memory_rate)}/s and {processor.flops_rate / 1e9:,.0f} GFLOPS, "
        f"{in_words(processor.bucket_seconds)} a bucket; forward and backward {in_words(plan.compute_seconds)}",
        "",
        _row("gradients", "sent as", "bytes before", "after", "seconds before", "after"),
        *itertools.starmap(_row, _groups(plan.choices)),
        _row(
            "latency, and work on buckets",
            "",
            "",
            "",
            in_words(plan.plain.fixed_seconds),
            in_words(chosen.fixed_seconds),
        ),
        _row(
            "all, hidden behind backward or not",
            "",
            bytes_in_words(plan.plain.nbytes),
            bytes_in_words(chosen.nbytes),
            in_words(plan.plain.reducing_seconds),
            in_words(chosen.reducing_seconds),
        ),
        _row("a step", "", "", "", in_words(plan.plain.step_seconds), in_words(chosen.step_seconds)),
        "",
        _row("compared", "", "bytes", "saved", "a step", "saved"),
    ]
    for label, estimate in plan.estimates.items():
        seconds, before = estimate.step_seconds, plan.plain.step_seconds
        kept = estimate.nbytes / plan.plain.nbytes if plan.plain.nbytes else 1.0
        saved = 1 - seconds / before if before else 0.0
        mark = " <- the plan" if estimate is chosen else ""
        lines.append(
            _row(label, "", bytes_in_words(estimate.nbytes), f"{1 - kept:.1%}", in_words(seconds), f"{saved:.0%}")
            + mark
        )
    return "\n".join(lines)


def _row(what: str, way: str, *cells: str) -> str:
    return f"{what:42.42} {way:9}" + "".join(f"{cell:>{16 if i % 2 == 0 else 10}}" for i, cell in enumerate(cells))


def _groups(choices: Sequence[Choice]) -> list[tuple[str, ...]]:
    """Gradients whose names differ in numbers only, and that are treated alike; the largest groups first."""
    groups: dict[tuple[object, ...], list[Choice]] = {}
    for choice in choices:
        groups.setdefault((re.sub(r"\d+", "*", choice.name), choice.shape, choice.way), []).append(choice)
    found = sorted(groups.values(), key=lambda group: -sum(choice.bytes_before for choice in group))
    rows = [_group(f"{_name(group)} {_shape(group[0].shape)}", group) for group in found[:_SHOWN]]
    rest = [choice for group in found[_SHOWN:] for choice in group]
    return rows + ([_group(f"{len(rest)} others", rest)] if rest else [])


def _name(group: Sequence[Choice]) -> str:
    return group[0].name if len(group) == 1 else f"{len(group)} x " + re.sub(r"\d+", "*", group[0].name)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _group(name: str, group: Sequence[Choice]) -> tuple[str, ...]:
    ways = {choice.way for choice in group}
    way = next(iter(ways)) if len(ways) == 1 else "mixed"
    return (
        name,
        f"rank {way}" if isinstance(way, int) else str(way),
        bytes_in_words(sum(choice.bytes_before for choice in group)),
        bytes_in_words(sum(choice.bytes_after for choice in group)),
        in_words(sum(choice.seconds_before for choice in group)),
        in_words(sum(choice.seconds_after for choice in group)),
    )
