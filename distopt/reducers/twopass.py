"""The power iteration of PowerSGD: left factors, then right factors, two rounds a step.

Source: Vogels et al. 2019 (arXiv:1905.13727), algorithm 1.
"""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from distopt.comm.requests import Request
from distopt.numerics.orthogonal import normalize_columns, orthogonalize
from distopt.reducers.lowrank import Factorised, Factors, LowRankPlan
from distopt.reducers.matrix import Matrix
from distopt.reducers.operand import Operand
from distopt.reducers.reducer import State


class TwoPassPlan(LowRankPlan):
    """P = M Q, orthonormalised, then Q = Mᵀ P; both averaged."""

    def factorise(
        self, inputs: Sequence[Operand], extra: Sequence[Tensor], state: State
    ) -> Generator[Request, Tensor, Factorised | None]:
        """See `LowRankPlan.factorise`."""
        layout = self.layout(state)
        before = [self._start(matrix, state) for matrix in self.matrices]
        # Side by side, as the last bits of a product depend on where its operands lie: those of a resumed run, too.
        bases = layout.views(torch.cat([q.mT.reshape(-1) for q in before]), "right")
        payload = self.payload(inputs, layout.numel("left"))
        for operand, q, p in zip(inputs, bases, layout.views(payload, "left"), strict=True):
            operand.times_right(q, p)
        shared = yield from self.share(extra, payload, state, 0)
        if shared is None:
            return None
        whole, sent = shared

        lefts = [p for stack in layout.stacks(sent.average, "left") for p in orthogonalize(stack.mT).mT.unbind()]
        payload = self.payload(inputs, layout.numel("right"))
        for operand, p, q in zip(inputs, lefts, layout.views(payload, "right"), strict=True):
            operand.times_left(p, q)
        shared = yield from self.share([], payload, state, 1)
        if shared is None:
            return None
        rights, own = (layout.views(flat, "right") for flat in shared[1])
        stacks = [stack.mT for stack in layout.stacks(shared[1].average, "right")]
        following = self._following(stacks, before, state)
        factors = [Factors(*fs) for fs in zip(lefts, rights, lefts, own, following, strict=True)]
        return Factorised(whole, factors, "right", shared[1].average)

    def sent_numbers(self, matrix: Matrix, rank: int, step: int) -> int:
        """See `LowRankPlan.sent_numbers`."""
        return (matrix.left + matrix.right) * rank

    def first_factor(self, matrix: Matrix) -> Tensor | None:
        """See `LowRankPlan.first_factor`."""
        if self.settings.basis != "warm":
            return None
        energy = self.settings.energy
        rank = matrix.rank if energy is None else min(matrix.rank, energy.rank(None))
        return self.draw(matrix, matrix.right, rank, 0)

    def _start(self, matrix: Matrix, state: State) -> Tensor:
        """Q of the step before, or a draw."""
        if self.settings.basis == "fresh":
            return self.draw(matrix, matrix.right, matrix.rank, state.step)
        if self.settings.basis == "fixed":
            if matrix.key not in self._fixed:
                self._fixed[matrix.key] = self.draw(matrix, matrix.right, matrix.rank, 0)
            return self._fixed[matrix.key]
        kept = self.kept_factor(matrix, state, matrix.right)
        if kept is not None:
            return kept
        first = self.first_factor(matrix)
        assert first is not None
        return first

    def _following(self, stacks: Sequence[Tensor], before: Sequence[Tensor], state: State) -> Sequence[Tensor | None]:
        """Q for the next step, with columns of length 1, so that nothing depends on the gradient's unit."""
        if self.settings.basis != "warm":
            return [None] * len(before)
        energy = self.settings.energy
        if energy is not None and energy.adapts_after(state.step):
            stacks = [energy.sorted_columns(stack) for stack in stacks]
        columns = [pair for stack in stacks for pair in zip(stack, *normalize_columns(stack), strict=True)]
        renewed: list[Tensor | None] = []
        for matrix, old, (right, unit, alive) in zip(self.matrices, before, columns, strict=True):
            following = self.renew(matrix, old, unit, alive, state.step)
            if energy is not None and energy.adapts_after(state.step) and bool(alive.any()):
                rank = energy.choose(right, matrix.rank)
                more = self.draw(matrix, matrix.right, rank, "more", state.step)
                following = torch.cat([following[:, :rank], more[:, following.shape[1] :]], dim=1)
            renewed.append(following)
        return renewed
