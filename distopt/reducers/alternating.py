"""One factor a step: half the bytes and half the rounds of a full power iteration.

Even steps keep Q and send P, odd steps keep P and send Q: the power iteration is spread over two steps.

Source: ACP-SGD, Zhang et al. 2023 (ICDCS), algorithm 1; the one-sided iterations of the `powersgd` package of Vogels.
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


class AlternatingPlan(LowRankPlan):
    """P = M Q on even steps, Q = Mᵀ P on odd ones, the other factor orthonormal.

    Both factors are kept, one above the other: a gradient of zero leaves them alone, and nothing depends on which of
    them came last.
    """

    def factorise(
        self, layout: Layout, inputs: Units, extra: Sequence[Tensor], state: State
    ) -> Generator[Request, Tensor, Factorised | None]:
        """See `LowRankPlan.factorise`."""
        even = state.step % 2 == 0
        side, other = ("left", "right") if even else ("right", "left")
        kept = [self._kept(matrix, state) for matrix in self.matrices]
        held = self._held(layout, kept, other, state)
        bases = layout.by_unit(orthonormal_rows(held), other)
        room = self.room(layout, side, extra)
        for unit, basis, factor in zip(inputs, bases, room.own_views, strict=True):
            (unit.times_right if even else unit.times_left)(basis, factor)
        shared = yield from self.share(extra, room, side, state)
        if shared is None:
            return None
        following = self._following(layout, side, shared.stacks, kept, held, state)
        factors = [
            Factors(average, basis, mine, basis) if even else Factors(basis, average, basis, mine)
            for basis, average, mine in zip(bases, shared.averages, shared.own, strict=True)
        ]
        return Factorised(shared.whole, factors, side, shared.average, shared.stacks, following)

    def factorise_together(
        self, layout: Layout, work: Work, extra: Sequence[Tensor], state: State
    ) -> Generator[Request, Tensor, Pending | None]:
        """See `LowRankPlan.factorise_together`."""
        even = state.step % 2 == 0
        side, other = ("left", "right") if even else ("right", "left")
        kept = [self._kept(matrix, state) for matrix in self.matrices]
        old, held = (self._held(layout, kept, each, state) for each in (side, other))
        basis, room = joined(orthonormal_rows(held)), self.room(layout, side, extra)
        work.times(side, basis, room.own)
        shared = yield from self.share(extra, room, side, state)
        if shared is None:
            return None
        average, own = shared.average, shared.mine
        factors = Factors(average, basis, own, basis) if even else Factors(basis, average, basis, own)
        stacks = work.following(side, shared.stacks, joined(old))
        new = [factor.mT for factor in layout.each(stacks, side)]
        following = [torch.cat([n, q] if even else [p, n]) for n, (p, q) in zip(new, kept, strict=True)]
        self.remember(following, {side: stacks, other: held})
        return Pending(shared.whole, factors, side, shared.stacks, following)

    def sent_numbers(self, matrix: Matrix, rank: int, step: int) -> int:
        """See `LowRankPlan.sent_numbers`."""
        return (matrix.left if step % 2 == 0 else matrix.right) * rank

    def first_factor(self, matrix: Matrix) -> Tensor | None:
        """See `LowRankPlan.first_factor`."""
        left = self.draw(matrix, matrix.left, matrix.rank, "left", 0)
        return torch.cat([left, self.draw(matrix, matrix.right, matrix.rank, 0)])

    def _kept(self, matrix: Matrix, state: State) -> tuple[Tensor, Tensor]:
        kept = self.kept_factor(matrix, state, matrix.left + matrix.right)
        if kept is None:
            kept = self.first_factor(matrix)
        assert kept is not None
        return kept[: matrix.left], kept[matrix.left :]

    def _held(self, layout: Layout, kept: Sequence[tuple[Tensor, Tensor]], side: str, state: State) -> list[Tensor]:
        """The kept factors of one side, laid out."""
        recalled = self.recalled(state)
        if recalled is None:
            flat = layout.gather([p if side == "left" else q for p, q in kept], side)
        else:
            flat = torch.cat([stack.reshape(-1) for stack in recalled[1][side]])
        return layout.stacks(flat, side)

    def _following(
        self,
        layout: Layout,
        side: str,
        sent: Sequence[Tensor],
        kept: Sequence[tuple[Tensor, Tensor]],
        held: list[Tensor],
        state: State,
    ) -> list[Tensor]:
        """Both factors for the next step, one above the other."""
        even = side == "left"
        old = [p if even else q for p, q in kept]
        renewed, stacks = self.renew(layout, side, [stack.mT for stack in sent], old, state.step)
        pairs = zip(renewed, kept, strict=True)
        following = [torch.cat([new, q] if even else [p, new]) for new, (p, q) in pairs]
        other = "right" if even else "left"
        self.remember(following, None if stacks is None else {side: stacks, other: held})
        return following
