"""PowerSGD: gradients as low-rank factors, with what was not sent kept for later.

Source: Vogels et al. 2019 (arXiv:1905.13727), algorithm 1 and 2, with the corrections of Ramesh et al. 2021
(arXiv:2102.12092), appendix E: Householder reflections, and a small multiple of the identity before them.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from distopt.errors import SettingError
from distopt.numerics.storage import StorageDtype, check_storage
from distopt.reducers.allreduce import AllReducePlan
from distopt.reducers.alternating import AlternatingPlan
from distopt.reducers.energy import EnergyRank
from distopt.reducers.factors import LowRankSettings
from distopt.reducers.matrix import Matrix
from distopt.reducers.memory import Memory, is_compressible
from distopt.reducers.phases import Phase, PhasedPlan
from distopt.reducers.reducer import Place, Plan, Reducer, Slot
from distopt.reducers.settings import is_integer, is_number
from distopt.reducers.twopass import TwoPassPlan

RankRule = int | float | EnergyRank | Callable[[str, nn.Parameter], int]
NameRule = Sequence[str] | Callable[[str, nn.Parameter], bool]

_RANKS = (
    "an integer of at least 1, a fraction in (0, 1] of the smaller side, a callable (name, parameter) -> int, "
    "an EnergyRank, or a mapping from steps to these"
)


@dataclasses.dataclass(frozen=True, repr=False)
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
            callable that gives the number for a name and its parameter, or an `EnergyRank` that adapts it. Never more
            than the smaller side. A mapping from steps to any of these is a schedule: each holds from its step on, and
            steps before the first are averaged exactly.
        min_saving: least fraction of a matrix's bytes that compressing it must save, below 1.
        basis: what Q a step starts from. ``"warm"``: that of the step before. ``"fixed"``: a Gaussian drawn once, as in
            DALL-E; it needs no memory, but with a constant gradient the residual grows and what is missing never
            arrives (noise is what moves P). ``"fresh"``: a Gaussian drawn at every step.
        passes: ``"both"`` sends P and Q at every step; ``"alternate"`` one of them, in turn, at half the bytes and half
            the rounds. It needs a warm basis. What one step misses, even of a gradient of low rank, the next delivers.
        start_step: average exactly for this many steps first.
        uncompressed: parameters to send whole besides: glob patterns of names, or a callable that is given the name and
            the parameter.
        stacked: parameters that hold several matrices one after the other along their first dimension, each to be
            compressed on its own: a mapping from glob patterns to how many, ``{"*.qkv.weight": 3, "*.experts.w1": 8}``.
        residual_dtype: what residuals are kept in: ``torch.float32`` (the default; float64 for float64 gradients),
            ``torch.bfloat16``, ``torch.float16`` or ``"1-6-9"``, DALL-E's format. Rounded stochastically.
        factor_dtype: what Q is kept in between steps: the same choice.
        wire_dtype: what factors travel in: ``torch.float32`` (the default), ``torch.bfloat16`` or ``torch.float16``.
            Sums are taken in float32 all the same; what rounding takes off stays in the residual.
        seed: of all random numbers, the same on all ranks.

    Raises:
        SettingError: if a setting is out of its range; the message names it, its value, and what is allowed.

    Example:
        >>> PowerSGD(rank=8, uncompressed=["*.router.*"]).rank
        8
        >>> PowerSGD(rank={0: 32, 1000: 8}, residual_dtype="1-6-9", wire_dtype=torch.bfloat16).residual_dtype
        '1-6-9'
        >>> PowerSGD(rank=0)
        Traceback (most recent call last):
            ...
        distopt.errors.SettingError: PowerSGD.rank is 0, but must be an integer of at least 1, a fraction in (0, 1] of \
the smaller side, a callable (name, parameter) -> int, an EnergyRank, or a mapping from steps to these
    """

    rank: RankRule | Mapping[int, RankRule] = 4
    _: dataclasses.KW_ONLY
    min_saving: float = 0.5
    basis: Literal["warm", "fixed", "fresh"] = "warm"
    passes: Literal["both", "alternate"] = "both"
    start_step: int = 0
    uncompressed: NameRule | None = None
    stacked: Mapping[str, int] | None = None
    residual_dtype: StorageDtype | None = None
    factor_dtype: StorageDtype | None = None
    wire_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_rank("PowerSGD.rank", self.rank)
        if not is_number(self.min_saving) or not self.min_saving < 1:
            raise SettingError("PowerSGD.min_saving", self.min_saving, "a number below 1")
        if self.basis not in ("warm", "fixed", "fresh"):
            raise SettingError("PowerSGD.basis", self.basis, "'warm', 'fixed' or 'fresh'")
        if self.passes not in ("both", "alternate"):
            raise SettingError("PowerSGD.passes", self.passes, "'both' or 'alternate'")
        if self.passes == "alternate" and (self.basis != "warm" or self._adapts):
            raise SettingError("PowerSGD.passes", self.passes, "'both' unless the basis is 'warm' and no rank adapts")
        if self._adapts and self.basis != "warm":
            raise SettingError("PowerSGD.basis", self.basis, "'warm' where the rank is an EnergyRank")
        if not is_integer(self.start_step) or self.start_step < 0:
            raise SettingError("PowerSGD.start_step", self.start_step, "an integer of at least 0")
        if not _is_name_rule(self.uncompressed):
            allowed = "None, a list of glob patterns, or a callable (name, parameter) -> bool"
            raise SettingError("PowerSGD.uncompressed", self.uncompressed, allowed)
        if not _is_stacking(self.stacked):
            raise SettingError("PowerSGD.stacked", self.stacked, "None or a mapping from glob patterns to integers")
        check_storage("PowerSGD.residual_dtype", self.residual_dtype)
        check_storage("PowerSGD.factor_dtype", self.factor_dtype)
        if self.wire_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            allowed = "None, torch.float32, torch.bfloat16 or torch.float16 (other formats cannot be added up)"
            raise SettingError("PowerSGD.wire_dtype", self.wire_dtype, allowed)
        if not is_integer(self.seed):
            raise SettingError("PowerSGD.seed", self.seed, "an integer")
        if isinstance(self.uncompressed, list):
            object.__setattr__(self, "uncompressed", tuple(self.uncompressed))

    def __repr__(self) -> str:
        settings = [(field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self)]
        shown = [f"{name}={value!r}" for name, value, default in settings if name == "rank" or value != default]
        return f"PowerSGD({', '.join(shown)})"

    def plan(self, slots: Sequence[Slot], place: Place) -> Plan:
        """See `Reducer.plan`."""
        schedule = self.rank if isinstance(self.rank, Mapping) else {0: self.rank}
        phases = [
            Phase(max(step, self.start_step), self._phase(slots, place, schedule[step])) for step in sorted(schedule)
        ]
        if phases[0].first_step > 0:
            phases.insert(0, Phase(0, AllReducePlan(slots)))
        return phases[0].plan if len(phases) == 1 else PhasedPlan(phases)

    @property
    def _adapts(self) -> bool:
        rules = self.rank.values() if isinstance(self.rank, Mapping) else [self.rank]
        return any(isinstance(rule, EnergyRank) for rule in rules)

    def _phase(self, slots: Sequence[Slot], place: Place, rule: RankRule) -> Plan:
        matrices = [self._matrices(slot, rule) for slot in slots]
        if not any(matrices):
            return AllReducePlan(slots)
        settings = LowRankSettings(
            seed=self.seed,
            basis=self.basis,
            memory=Memory(self.residual_dtype, self.seed),
            factor_dtype=self.factor_dtype,
            wire_dtype=None if self.wire_dtype == torch.float32 else self.wire_dtype,
            energy=rule if isinstance(rule, EnergyRank) else None,
        )
        kind = TwoPassPlan if self.passes == "both" else AlternatingPlan
        return kind(slots, matrices, settings, place)

    def _matrices(self, slot: Slot, rule: RankRule) -> list[Matrix]:
        """How a parameter is compressed; empty if it is sent whole."""
        slices = self._slices(slot)
        if not is_compressible(slot) or self.leaves_whole(slot):
            return []
        matrices = Matrix.of(slot, _rank_of(slot, rule), slices)
        raw = slot.parameter.numel() * slot.parameter.element_size()
        width = (self.wire_dtype or matrices[0].dtype).itemsize
        sent = sum(sum(matrix.shape) * matrix.rank for matrix in matrices) * width
        worth_it = min(matrices[0].shape) > 1 and 1 - sent / raw >= self.min_saving
        return matrices if worth_it else []

    def _slices(self, slot: Slot) -> int:
        for pattern, slices in (self.stacked or {}).items():
            if fnmatch.fnmatchcase(slot.name, pattern):
                first = slot.parameter.shape[0] if slot.parameter.dim() > 0 else 0
                if first % slices != 0 or slot.parameter.dim() < 2:
                    shape = tuple(slot.parameter.shape)
                    allowed = f"a divisor of the first dimension of {slot.name!r}, whose shape is {shape}"
                    raise SettingError(f"PowerSGD.stacked[{pattern!r}]", slices, allowed)
                return slices
        return 1

    def leaves_whole(self, slot: Slot) -> bool:
        """Whether ``uncompressed`` names a parameter.

        Args:
            slot: the parameter.

        Example:
            >>> PowerSGD(uncompressed=["head.*"]).leaves_whole(Slot("head.weight", nn.Parameter(torch.empty(2, 2))))
            True
        """
        rule = self.uncompressed
        if rule is None:
            return False
        if callable(rule):
            return bool(rule(slot.name, slot.parameter))
        return any(fnmatch.fnmatchcase(slot.name, pattern) for pattern in rule)


def _rank_of(slot: Slot, rule: RankRule) -> int | float:
    if isinstance(rule, EnergyRank):
        return rule.most
    if not callable(rule):
        return rule
    rank = rule(slot.name, slot.parameter)
    if not is_integer(rank) or rank < 1:
        raise SettingError(f"PowerSGD.rank({slot.name!r})", rank, "an integer of at least 1")
    return rank


def _check_rank(field: str, rule: object) -> None:
    if isinstance(rule, Mapping) and rule:
        for step, part in cast(Mapping[Any, object], rule).items():
            if not is_integer(step) or step < 0:
                raise SettingError(f"{field} step", step, "an integer of at least 0")
            if isinstance(part, Mapping):
                raise SettingError(f"{field}[{step}]", part, _RANKS)
            _check_rank(f"{field}[{step}]", part)
        return
    if isinstance(rule, float):
        sound = 0 < rule <= 1
    else:
        sound = isinstance(rule, EnergyRank) or callable(rule) or (is_integer(rule) and cast(int, rule) >= 1)
    if not sound:
        raise SettingError(field, rule, _RANKS)


def _is_name_rule(rule: object) -> bool:
    if rule is None or callable(rule):
        return True
    return isinstance(rule, (list, tuple)) and all(isinstance(p, str) for p in cast(Sequence[object], rule))


def _is_stacking(rule: object) -> bool:
    if rule is None:
        return True
    if not isinstance(rule, Mapping):
        return False
    return all(isinstance(k, str) and is_integer(v) and v >= 1 for k, v in cast(Mapping[Any, Any], rule).items())
