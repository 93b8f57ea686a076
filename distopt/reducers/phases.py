"""One plan after another, as the steps go by."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distopt.reducers.reducer import Bucket, Plan, Reduction, State


class Phase(NamedTuple):
    """A plan, and the step from which it is at work."""

    first_step: int
    plan: Plan


class PhasedPlan(Plan):
    """Follows a schedule of plans; what one leaves behind, the next takes up.

    Args:
        phases: in the order of their steps; the first begins at 0.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        self._phases = phases

    def reduce(self, bucket: Bucket, state: State) -> Reduction:
        """See `Plan.reduce`."""
        return self._at(state.step).reduce(bucket, state)

    def residual_shapes(self) -> Mapping[str, Sequence[int]]:
        """See `Plan.residual_shapes`."""
        return {name: shape for phase in self._phases for name, shape in phase.plan.residual_shapes().items()}

    def factor_shapes(self) -> Mapping[str, Sequence[int]]:
        """See `Plan.factor_shapes`; -1 stands for a number that changes from phase to phase."""
        merged: dict[str, Sequence[int]] = {}
        for phase in self._phases:
            for name, shape in phase.plan.factor_shapes().items():
                before = merged.get(name, shape)
                merged[name] = [a if a == b else -1 for a, b in zip(before, shape, strict=True)]
        return merged

    def describe(self) -> str:
        """See `Plan.describe`."""
        return "; ".join(f"from step {phase.first_step} {phase.plan.describe()}" for phase in self._phases)

    def prepare(self, state: State) -> None:
        """See `Plan.prepare`."""
        self._at(state.step).prepare(state)
        for phase in self._phases:
            phase.plan.prepare(state)

    def _at(self, step: int) -> Plan:
        return [phase.plan for phase in self._phases if phase.first_step <= step][-1]
