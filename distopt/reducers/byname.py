"""Different reducers for different parameters."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from distopt.errors import SettingError
from distopt.reducers.allreduce import AllReduce
from distopt.reducers.reducer import Bucket, Place, Plan, Proposal, Reducer, Reduction, Slot, State


@dataclasses.dataclass(frozen=True)
class ByName(Reducer):
    """Reduce each parameter by the rule that its name matches first.

    The reducers work one after the other, each in rounds of its own, and the step is taken as a whole or not at all.

    Args:
        rules: glob patterns of names, each with its reducer, in the order in which they are tried.
        default: for parameters that no pattern matches.

    Raises:
        SettingError: if a rule is no pattern, or its reducer none.

    Example:
        >>> from distopt import Cast, PowerSGD, TopK
        >>> import torch
        >>> policy = ByName({"*.mlp.*": PowerSGD(rank=8), "*.attention.*": TopK(0.01)}, default=Cast(torch.bfloat16))
        >>> sorted(policy.rules)
        ['*.attention.*', '*.mlp.*']
    """

    rules: Mapping[str, Reducer]
    default: Reducer = dataclasses.field(default_factory=AllReduce)

    def __post_init__(self) -> None:
        if not isinstance(cast(object, self.rules), Mapping) or not self.rules:
            raise SettingError("ByName.rules", self.rules, "a mapping from glob patterns to reducers")
        for pattern, reducer in cast(Mapping[Any, object], self.rules).items():
            if not isinstance(pattern, str) or not isinstance(reducer, Reducer):
                raise SettingError(f"ByName.rules[{pattern!r}]", reducer, "a reducer, for a glob pattern")
        if not isinstance(cast(object, self.default), Reducer):
            raise SettingError("ByName.default", self.default, "a reducer")

    def plan(self, slots: Sequence[Slot], place: Place) -> Plan:
        """See `Reducer.plan`."""
        shares: list[tuple[Reducer, list[int]]] = []
        for index, slot in enumerate(slots):
            reducer = self._reducer_for(slot)
            same = next((places for other, places in shares if other is reducer), None)
            if same is None:
                shares.append((reducer, [index]))
            else:
                same.append(index)
        return SplitPlan([(reducer.plan([slots[i] for i in where], place), where) for reducer, where in shares])

    def parts(self, world_size: int) -> Mapping[str, Sequence[Sequence[int]]]:
        """See `Reducer.parts`."""
        merged: dict[str, Sequence[Sequence[int]]] = {}
        for reducer in (*self.rules.values(), self.default):
            for name, groups in reducer.parts(world_size).items():
                if merged.setdefault(name, groups) != groups:
                    raise SettingError("ByName.rules", self.rules, "reducers that agree on the ranks of a node")
        return merged

    def _reducer_for(self, slot: Slot) -> Reducer:
        rules = self.rules.items()
        return next((r for pattern, r in rules if fnmatch.fnmatchcase(slot.name, pattern)), self.default)


class SplitPlan(Plan):
    """Several plans, each for some of a bucket's slots.

    Args:
        shares: plans, and the places of their slots in the bucket.
    """

    def __init__(self, shares: Sequence[tuple[Plan, Sequence[int]]]) -> None:
        self._shares = shares

    def reduce(self, bucket: Bucket, state: State) -> Reduction:
        """See `Plan.reduce`."""
        proposals: list[Proposal] = []
        for plan, where in self._shares:
            alone = len(where) == len(bucket.gradients)
            part = Bucket(
                [bucket.gradients[i] for i in where],
                [bucket.segments[i] for i in where],
                bucket.flat if alone else None,
            )
            proposal = yield from plan.reduce(part, state)
            if proposal is None:
                return None
            proposals.append(proposal)

        def commit() -> None:
            for proposal in proposals:
                proposal.commit()

        before, after = zip((0, 0), *(p.bytes_compressed for p in proposals), strict=True)
        norms = {name: norm for proposal in proposals for name, norm in proposal.norms.items()}
        flags = [proposal.sound for proposal in proposals if proposal.sound is not None]
        return Proposal(commit, (sum(before), sum(after)), norms, torch.stack(flags).all() if flags else None)

    def residual_shapes(self) -> Mapping[str, Sequence[int]]:
        """See `Plan.residual_shapes`."""
        return {name: shape for plan, _ in self._shares for name, shape in plan.residual_shapes().items()}

    def factor_shapes(self) -> Mapping[str, Sequence[int]]:
        """See `Plan.factor_shapes`."""
        return {name: shape for plan, _ in self._shares for name, shape in plan.factor_shapes().items()}

    def describe(self) -> str:
        """See `Plan.describe`."""
        return "; ".join(plan.describe() for plan, _ in self._shares)

    def prepare(self, state: State) -> None:
        """See `Plan.prepare`."""
        for plan, _ in self._shares:
            plan.prepare(state)
