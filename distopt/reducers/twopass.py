"""The power iteration of PowerSGD: left factors, then right factors, two rounds a step.

Source: Vogels et al. 2019 (arXiv:1905.13727), algorithm 1.
"""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from distopt.comm.requests import Request
from distopt.numerics.orthogonal import orthonormal_rows
from distopt.reducers.factors import Factorised, Factors
from distopt.reducers.fused import Pending, Work, joined
from distopt.reducers.lowrank import LowRankPlan, Units
from distopt.reducers.matrix import Layout, Matrix
from distopt.reducers.reducer import State


class TwoPassPlan(LowRankPlan):
    """P = M Q, orthonormalised, then Q = Mᵀ P; both averaged."""

    def factorise(
        self, layout: Layout, inputs: Units, extra: Sequence[Tensor], state: State
    ) -> Generator[Request, Tensor, Factorised | None]:
        """See `LowRankPlan.factorise`."""
        before, starts = self._basis(layout, state)
        room = self.room(layout, "left", extra, keeps_own=False)
        for unit, q, p in zip(inputs, starts, room.own_views, strict=True):
            unit.times_right(q, p)
        shared = yield from self.share(extra, room, "left", state)
        if shared is None:
            return None
        whole = shared.whole

        lefts = layout.by_unit(orthonormal_rows(shared.stacks), "left")
        room = self.room(layout, "right")
        for unit, p, q in zip(inputs, lefts, room.own_views, strict=True):
            unit.times_left(p, q)
        shared = yield from self.share([], room, "right", state)
        if shared is None:
            return None
        following = self._following(layout, shared.stacks, before, state)
        factors = [Factors(*fs) for fs in zip(lefts, shared.averages, lefts, shared.own, strict=True)]
        return Factorised(whole, factors, "right", shared.average, shared.stacks, following)

    def factorise_together(
        self, layout: Layout, work: Work, extra: Sequence[Tensor], state: State
    ) -> Generator[Request, Tensor, Pending | None]:
        """See `LowRankPlan.factorise_together`."""
        recalled = self.recalled(state)
        if recalled is None:
            before = layout.gather([self._start(matrix, state) for matrix in self.matrices], "right")
        else:
            before = joined(recalled[1]["right"])
        room = self.room(layout, "left", extra, keeps_own=False)
        work.times("left", before, room.own)
        shared = yield from self.share(extra, room, "left", state)
        if shared is None:
            return None
        whole, left = shared.whole, joined(orthonormal_rows(shared.stacks))
        room = self.room(layout, "right")
        work.times("right", left, room.own)
        shared = yield from self.share([], room, "right", state)
        if shared is None:
            return None
        following: Sequence[Tensor | None] = [None] * len(self.matrices)
        if self.settings.basis == "warm":
            stacks = work.following("right", shared.stacks, before)
            renewed = [factor.mT for factor in layout.each(stacks, "right")]
            self.remember(renewed, {"right": stacks})
            following = renewed
        return Pending(whole, Factors(left, shared.average, left, shared.mine), "right", shared.stacks, following)

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

    def _basis(self, layout: Layout, state: State) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What this step starts from, by matrix, and laid out, by unit.

        Side by side, as the last bits of a product depend on where its operands lie: those of a resumed run, too.
        """
        recalled = self.recalled(state)
        if recalled is None:
            before = [self._start(matrix, state) for matrix in self.matrices]
            return before, layout.views(layout.gather(before, "right"), "right")
        room = self.room(layout, "right")
        # Where Q of this step will be: by then nobody asks for the one that it started from.
        torch.cat([stack.reshape(-1) for stack in recalled[1]["right"]], out=room.own)
        return recalled[0], room.own_views

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

    def _following(
        self, layout: Layout, rights: Sequence[Tensor], before: Sequence[Tensor], state: State
    ) -> Sequence[Tensor | None]:
        """Q for the next step, with columns of length 1, so that nothing depends on the gradient's unit."""
        if self.settings.basis != "warm":
            return [None] * len(before)
        energy = self.settings.energy
        stacks = [stack.mT for stack in rights]
        adapts = energy is not None and energy.adapts_after(state.step)
        if energy is not None and adapts:
            stacks = [energy.sorted_columns(stack) for stack in stacks]
        renewed, whole = self.renew(layout, "right", stacks, before, state.step)
        self.remember(renewed, None if whole is None else {"right": whole})
        if energy is None or not adapts:
            return renewed
        following: list[Tensor] = []
        for matrix, right, new in zip(self.matrices, layout.each(stacks, "right"), renewed, strict=True):
            if bool(right.any()):
                rank = energy.choose(right, matrix.rank)
                more = self.draw(matrix, matrix.right, rank, "more", state.step)
                new = torch.cat([new[:, :rank], more[:, new.shape[1] :]], dim=1)
            following.append(new)
        return following
