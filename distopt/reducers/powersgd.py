"""PowerSGD: gradients as low-rank factors, with what was not sent kept for later.

Source: Vogels et al. 2019 (arXiv:1905.13727), algorithm 1 and 2, with the corrections of Ramesh et al. 2021
(arXiv:2102.12092), appendix E: Householder reflections, and a small multiple of the identity before them.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence

from torch import nn

from distopt.errors import SettingError
from distopt.reducers.allreduce import AllReducePlan
from distopt.reducers.lowrank import LowRankPlan, Matrix
from distopt.reducers.reducer import Bucket, Plan, Reducer, Reduction, Slot, State

RankRule = int | float | Callable[[str, nn.Parameter], int]
NameRule = Sequence[str] | Callable[[str, nn.Parameter], bool]


@dataclasses.dataclass(frozen=True)
class PowerSGD(Reducer):
    """Send each matrix gradient as two thin factors, found by one power iteration a step.

    For a gradient plus residual M of ``n x m`` (the smaller side first) and the factor Q of the step before: average
    P = M Q over the ranks, orthonormalise it, average Q = Mᵀ P, and deliver P Qᵀ. Each rank keeps M - P Q_localᵀ as its
    residual and adds it to its next gradient. The result does not depend on the gradient's unit and is exact where
    ``rank`` is at least the gradient's true rank.

    Sent whole are: vectors; parameters of norms and of embeddings, whatever is tied to them, names that match
    ``*lm_head*`` or ``*unembed*``; matrices that would save less than ``min_saving``; and what ``uncompressed`` names.
    Parameters of more than two dimensions are compressed as the matrix nearest to square.

    Args:
        rank: columns of the factors: a number of at least 1, or a fraction in (0, 1] of a matrix's smaller side, or a
            callable that gives the number for a name and its parameter. Never more than the smaller side.
        min_saving: least fraction of a matrix's bytes that compressing it must save, below 1.
        start_step: average exactly for this many steps first.
        uncompressed: parameters to send whole besides: glob patterns of names, or a callable that is given the name and
            the parameter.
        seed: of the Gaussian that Q starts from, the same on all ranks.

    Raises:
        SettingError: if a setting is out of its range; the message names it, its value, and what is allowed.

    Example:
        >>> PowerSGD(rank=8, uncompressed=["*.router.*"]).rank
        8
        >>> PowerSGD(rank=0)
        Traceback (most recent call last):
            ...
        distopt.errors.SettingError: PowerSGD.rank is 0, but must be an integer of at least 1, a fraction in (0, 1] of \
the smaller side, or a callable (name, parameter) -> int
    """

    rank: RankRule = 4
    _: dataclasses.KW_ONLY
    min_saving: float = 0.5
    start_step: int = 0
    uncompressed: NameRule | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_rank_rule(self.rank):
            allowed = (
                "an integer of at least 1, a fraction in (0, 1] of the smaller side, "
                "or a callable (name, parameter) -> int"
            )
            raise SettingError("PowerSGD.rank", self.rank, allowed)
        if not _is_number(self.min_saving) or not self.min_saving < 1:
            raise SettingError("PowerSGD.min_saving", self.min_saving, "a number below 1")
        if not _is_integer(self.start_step) or self.start_step < 0:
            raise SettingError("PowerSGD.start_step", self.start_step, "an integer of at least 0")
        if not _is_name_rule(self.uncompressed):
            allowed = "None, a list of glob patterns, or a callable (name, parameter) -> bool"
            raise SettingError("PowerSGD.uncompressed", self.uncompressed, allowed)
        if not _is_integer(self.seed):
            raise SettingError("PowerSGD.seed", self.seed, "an integer")
        if isinstance(self.uncompressed, list):
            object.__setattr__(self, "uncompressed", tuple(self.uncompressed))

    def plan(self, slots: Sequence[Slot]) -> Plan:
        """See `Reducer.plan`."""
        matrices = [self._matrix(slot) for slot in slots]
        exact = AllReducePlan()
        if not any(matrices):
            return exact
        return _StartingPlan(self.start_step, exact, LowRankPlan(matrices, self.seed))

    def _matrix(self, slot: Slot) -> Matrix | None:
        parameter = slot.parameter
        if slot.exempt or not parameter.is_floating_point() or parameter.numel() == 0 or self._is_named(slot):
            return None
        matrix = Matrix.of(slot, self._rank_of(slot))
        raw, compressed = matrix.bytes
        worth_it = min(matrix.shape) > 1 and 1 - compressed / raw >= self.min_saving
        return matrix if worth_it else None

    def _is_named(self, slot: Slot) -> bool:
        rule = self.uncompressed
        if rule is None:
            return False
        if callable(rule):
            return bool(rule(slot.name, slot.parameter))
        return any(fnmatch.fnmatchcase(slot.name, pattern) for pattern in rule)

    def _rank_of(self, slot: Slot) -> int | float:
        if not callable(self.rank):
            return self.rank
        rank = self.rank(slot.name, slot.parameter)
        if not _is_integer(rank) or rank < 1:
            raise SettingError(f"PowerSGD.rank({slot.name!r})", rank, "an integer of at least 1")
        return rank


@dataclasses.dataclass(frozen=True)
class _StartingPlan(Plan):
    """Exact until a step, compressed from there on."""

    start_step: int
    before: Plan
    after: Plan

    def reduce(self, bucket: Bucket, state: State) -> Reduction:
        plan = self.before if state.step < self.start_step else self.after
        return plan.reduce(bucket, state)

    def residual_shapes(self) -> Mapping[str, Sequence[int]]:
        return self.after.residual_shapes()

    def factor_shapes(self) -> Mapping[str, Sequence[int]]:
        return self.after.factor_shapes()


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_rank_rule(rule: object) -> bool:
    if isinstance(rule, float):
        return 0 < rule <= 1
    return callable(rule) or (isinstance(rule, int) and not isinstance(rule, bool) and rule >= 1)


def _is_name_rule(rule: object) -> bool:
    if rule is None or callable(rule):
        return True
    return isinstance(rule, (list, tuple)) and all(isinstance(pattern, str) for pattern in rule)  # type: ignore[reportUnknownVariableType]
