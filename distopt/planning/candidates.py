"""The ways of reducing a model that are compared, each as the reducer that would be registered."""

import dataclasses
import glob
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from distopt.planning.costs import Estimator, Scheme
from distopt.planning.foreseen import HALF, WHOLE, Way, may_be_ranked
from distopt.reducers.byname import ByName
from distopt.reducers.cast import Cast
from distopt.reducers.memory import is_compressible
from distopt.reducers.powersgd import PowerSGD
from distopt.reducers.reducer import Reducer, Slot

PLAIN = "plain DDP"


@dataclasses.dataclass(frozen=True)
class RankOf:
    """A rank for each parameter by its name: what `PowerSGD` takes as its ``rank``.

    Args:
        ranks: by name.

    Example:
        >>> RankOf({"a": 8})("a", nn.Parameter(torch.empty(2, 2)))
        8
    """

    ranks: Mapping[str, int]

    def __call__(self, name: str, parameter: nn.Parameter) -> int:
        """The rank of one parameter; one that the plan does not know is sent whole by other means."""
        return self.ranks.get(name, 1)


def plain(slots: Sequence[Slot]) -> Scheme:
    """DDP by itself."""
    return Scheme(PLAIN, None, {slot.name: WHOLE for slot in slots})


def half(slots: Sequence[Slot]) -> Scheme:
    """Every gradient in 16 bits."""
    return Scheme(HALF, Cast(torch.bfloat16), {slot.name: HALF for slot in slots})


def low_rank(
    slots: Sequence[Slot],
    ranks: Sequence[int],
    passes: Literal["both", "alternate"],
    estimator: Estimator,
    *,
    like: PowerSGD,
    rest: Literal["whole", "16 bits"] = WHOLE,
    always: bool = False,
) -> Scheme | None:
    """Matrices as factors of at most a rank, wherever that is faster for the matrix than sending it whole.

    Args:
        slots: all gradients.
        ranks: that a matrix may have, the largest of which is asked for.
        passes: as for `PowerSGD`.
        estimator: tells how long a gradient takes.
        like: has all other settings.
        rest: how everything else is sent.
        always: at the largest rank wherever `PowerSGD` would, as if it were faster.

    Returns:
        ``None`` if it is faster for no matrix.
    """
    alternate = passes == "alternate"
    known: dict[tuple[object, ...], Way] = {}
    ways: dict[str, Way] = {}
    for slot in slots:
        key = (tuple(slot.parameter.shape), slot.parameter.dtype, slot.exempt or like.leaves_whole(slot))
        if key not in known:
            known[key] = rest if key[-1] else _way_of(slot, ranks, None if always else estimator, alternate, like, rest)
        ways[slot.name] = known[key]
    chosen = {name: way for name, way in ways.items() if isinstance(way, int)}
    if not chosen:
        return None
    whole = tuple(glob.escape(s.name) for s in slots if s.name not in chosen and is_compressible(s))
    different = set(chosen.values())
    rank = RankOf(chosen) if len(different) > 1 else different.pop()
    reducer: Reducer = dataclasses.replace(like, rank=rank, passes=passes, uncompressed=whole or None)
    if rest == HALF:
        reducer = ByName({glob.escape(name): reducer for name in chosen}, default=Cast(torch.bfloat16))
    label = f"rank {max(ranks)}" + (", alternate" if alternate else "")
    return Scheme(label + (", rest in 16 bits" if rest == HALF else ""), reducer, ways, alternate, like.wire_dtype)


def _way_of(
    slot: Slot,
    ranks: Sequence[int],
    estimator: Estimator | None,
    alternate: bool,
    like: PowerSGD,
    rest: Literal["whole", "16 bits"],
) -> Way:
    """The highest rank at which a matrix is faster than otherwise."""
    for rank in sorted(ranks, reverse=True):
        if may_be_ranked(slot, rank, like.min_saving, like.wire_dtype) and (
            estimator is None
            or estimator.alone(slot, rank, alternate=alternate, wire_dtype=like.wire_dtype)
            < estimator.alone(slot, rest)
        ):
            return rank
    return rest
