"""One factor a step: half the bytes and half the rounds of a full power iteration.

Even steps keep Q and send P, odd steps keep P and send Q: the power iteration is spread over two steps.

Source: ACP-SGD, Zhang et al. 2023 (ICDCS), algorithm 1; the one-sided iterations of the `powersgd` package of Vogels.
"""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from distopt.comm.requests import Request
from distopt.numerics.orthogonal import orthogonalize
from distopt.reducers.lowrank import Factorised, Factors, LowRankPlan
from distopt.reducers.matrix import Matrix
from distopt.reducers.operand import Operand
from distopt.reducers.reducer import State


class AlternatingPlan(LowRankPlan):
    """P = M Q on even steps, Q = Mᵀ P on odd ones, the other factor orthonormal.

    Both factors are kept, one above the other: a gradient of zero leaves them alone, and nothing depends on which of
    them came last.
    """

    def factorise(
        self, inputs: Sequence[Operand], extra: Sequence[Tensor], state: State
    ) -> Generator[Request, Tensor, Factorised | None]:
        """See `LowRankPlan.factorise`."""
        layout, even = self.layout(state), state.step % 2 == 0
        side, other = ("left", "right") if even else ("right", "left")
        kept = [self._kept(matrix, state) for matrix in self.matrices]
        flat = layout.gather([q if even else p for p, q in kept], other)
        bases = layout.each([orthogonalize(stack.mT).mT for stack in layout.stacks(flat, other)], other)
        payload = self.payload(inputs, layout.numel(side))
        for operand, basis, factor in zip(inputs, bases, layout.views(payload, side), strict=True):
            (operand.times_right if even else operand.times_left)(basis, factor)
        shared = yield from self.share(extra, payload, state, 0)
        if shared is None:
            return None
        whole, sent = shared
        averages, own = (layout.views(flat, side) for flat in sent)
        stacks = [stack.mT for stack in layout.stacks(sent.average, side)]
        renewed = self.renew(layout, side, stacks, [p if even else q for p, q in kept], state.step)
        factors: list[Factors] = []
        for (p, q), basis, average, mine, new in zip(kept, bases, averages, own, renewed, strict=True):
            following = torch.cat([new, q] if even else [p, new])
            pairs = (average, basis, mine, basis) if even else (basis, average, basis, mine)
            factors.append(Factors(*pairs, following))
        return Factorised(whole, factors, side, sent.average)

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
