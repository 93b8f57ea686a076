"""Low-rank reduction of one bucket: what all ways of finding the factors share.

Whatever is sent whole travels with the first factors, so that a bucket takes as many rounds as there are factors to
find. Symbols as in `distopt.numerics.reference`.
"""

import abc
import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.comm.requests import Request
from distopt.numerics.codecs import FloatCodec, PlainCodec
from distopt.numerics.finite import all_finite
from distopt.numerics.gaussian import seeded_gaussian
from distopt.numerics.orthogonal import normalize_columns, normalize_stacks
from distopt.numerics.storage import StorageDtype, pack, unpack
from distopt.reducers.allreduce import split_into
from distopt.reducers.coded import Coded, Sent, coded_average
from distopt.reducers.energy import EnergyRank
from distopt.reducers.matrix import Layout, Matrix
from distopt.reducers.memory import Memory, flush, forget, working_dtype
from distopt.reducers.operand import Operand
from distopt.reducers.reducer import Bucket, Figures, Place, Plan, Proposal, Reduction, Slot, State


class Factors(NamedTuple):
    """A low-rank matrix as all ranks have it, and as this rank put it in: all transposed."""

    left: Tensor  # Pᵀ, (r, n)
    right: Tensor  # Qᵀ, (r, m)
    own_left: Tensor
    own_right: Tensor
    next: Tensor | None  # what the next step starts from, a column a direction; None: nothing is kept


class Factorised(NamedTuple):
    """What the rounds of a bucket came to."""

    whole: Tensor  # the average of what is sent whole, in one piece
    factors: list[Factors]
    side: str  # which factors came last, "left" or "right"; the columns of the others are orthonormal
    last: Tensor  # all of these, averaged, as `Layout` lays them out


@dataclasses.dataclass(frozen=True)
class LowRankSettings:
    """What a plan needs to know of `PowerSGD`."""

    seed: int
    basis: str
    memory: Memory
    factor_dtype: StorageDtype | None
    wire_dtype: torch.dtype | None
    energy: EnergyRank | None


class LowRankPlan(Plan):
    """Low-rank reduction of the matrices of a bucket, exact averaging of the rest.

    Args:
        slots: of the bucket.
        matrices: one list a slot; empty for what is sent whole.
        settings: shared by all of them.
        place: of this rank.
    """

    def __init__(
        self, slots: Sequence[Slot], matrices: Sequence[Sequence[Matrix]], settings: LowRankSettings, place: Place
    ) -> None:
        self.matrices = [m for of_slot in matrices for m in of_slot]
        self.settings = settings
        self._place = place
        self._chosen = [i for i, of_slot in enumerate(matrices) if of_slot]
        self._whole = [i for i, of_slot in enumerate(matrices) if not of_slot]
        self._slots = [slots[i] for i in self._chosen]
        self._whole_slots = [slots[i] for i in self._whole]
        self._optional = any(slot.optional for slot in self._slots)
        self._places = [[i for i, m in enumerate(self.matrices) if m.slot is slot] for slot in self._slots]
        self._fixed: dict[str, Tensor] = {}
        self._most = tuple(matrix.rank for matrix in self.matrices)
        self._raw = sum(slot.parameter.numel() * slot.parameter.element_size() for slot in self._slots)
        self._layouts: dict[tuple[int, ...], Layout] = {}

    @abc.abstractmethod
    def factorise(
        self, inputs: Sequence[Operand], extra: Sequence[Tensor], state: State
    ) -> Generator[Request, Tensor, Factorised | None]:
        """Find the factors of ``inputs``, one a matrix, and average ``extra`` along with the first of them.

        Returns:
            What came of it; ``None`` if anything averaged was not finite.
        """

    @abc.abstractmethod
    def sent_numbers(self, matrix: Matrix, rank: int, step: int) -> int:
        """Numbers that are sent for a matrix."""

    @abc.abstractmethod
    def first_factor(self, matrix: Matrix) -> Tensor | None:
        """What a matrix starts from, ``None`` if it keeps nothing."""

    def reduce(self, bucket: Bucket, state: State) -> Reduction:
        """See `Plan.reduce`."""
        gradients = {slot.name: bucket.gradients[i] for slot, i in zip(self._slots, self._chosen, strict=True)}
        segments = [bucket.segments[i] for i in self._whole]
        flushed = flush(self._whole_slots, [bucket.gradients[i] for i in self._whole], state)
        norms = _norms(gradients) if state.figures is not None else {}
        present = [float(g.any()) for g in gradients.values()] if self._optional else []
        residuals = state.residuals
        inputs = [Operand(m, gradients[m.slot.name], residuals.get(m.slot.name)) for m in self.matrices]
        first = self.matrices[0].dtype
        extra = [segment if segment.dtype == first else segment.to(first) for segment in segments]
        if present:
            extra.append(torch.tensor(present, dtype=first, device=inputs[0].device))
        outcome = yield from self.factorise(inputs, extra, state)
        if outcome is None:
            return None
        averaged, factors = outcome.whole, outcome.factors
        if self._overflow(outcome):
            return None
        whole, flags = averaged.split([averaged.numel() - len(present), len(present)])
        used = flags.tolist() if present else [1.0] * len(gradients)

        def commit() -> None:
            split_into(segments, whole)
            forget(flushed, state)
            for slot, places, is_used in zip(self._slots, self._places, used, strict=True):
                if is_used:
                    own = [(inputs[i], factors[i]) for i in places]
                    self._commit(slot, own, gradients[slot.name], norms.get(slot.name), state)
                else:
                    gradients[slot.name].zero_()

        # A step may leave optional parameters without a gradient: what their factors say is not delivered then.
        delivered = {} if present else self._norms(outcome, state)
        return Proposal(commit, self._bytes(state), delivered)

    def residual_shapes(self) -> Mapping[str, Sequence[int]]:
        """See `Plan.residual_shapes`."""
        return {slot.name: slot.parameter.shape for slot in self._slots}

    def factor_shapes(self) -> Mapping[str, Sequence[int]]:
        """See `Plan.factor_shapes`; -1 stands for an adaptive rank."""
        shapes: dict[str, Sequence[int]] = {}
        for matrix in self.matrices:
            first = self.first_factor(matrix)
            if first is not None:
                shapes[matrix.key] = (first.shape[0], first.shape[1] if self.settings.energy is None else -1)
        return shapes

    def describe(self) -> str:
        """See `Plan.describe`."""
        matrices = [f"{m.shape[0]} x {m.shape[1]} at rank {m.rank}" for m in self.matrices]
        return ", ".join(matrices + ["sent whole"] * len(self._whole))

    def prepare(self, state: State) -> None:
        """See `Plan.prepare`."""
        for slot in self._slots:
            if slot.name not in state.residuals:
                zeros = torch.zeros(slot.parameter.shape, dtype=working_dtype(slot), device=slot.parameter.device)
                self.settings.memory.keep(slot, zeros, state)
        for matrix in self.matrices:
            first = self.first_factor(matrix)
            if matrix.key not in state.factors and first is not None:
                state.factors[matrix.key] = pack(first, self.settings.factor_dtype)

    def layout(self, state: State) -> Layout:
        """Where the factors of this step lie."""
        ranks = self._most if self.settings.energy is None else tuple(self._rank(m, state) for m in self.matrices)
        if ranks not in self._layouts:
            self._layouts[ranks] = Layout(self.matrices, ranks)
        return self._layouts[ranks]

    def kept_factor(self, matrix: Matrix, state: State, rows: int) -> Tensor | None:
        """The factor of the step before, fitted to the rank of this one; ``None`` before the first."""
        stored = state.factors.get(matrix.key)
        if stored is None:
            return None
        factor = unpack(stored, matrix.dtype)
        rank = self._rank(matrix, state)
        if factor.shape == (rows, rank):
            return factor
        if factor.shape[0] != rows:  # another reducer's, which passed this way
            return None
        if factor.shape[1] >= rank:
            return factor[:, :rank]
        return torch.cat([factor, self.draw(matrix, rows, rank, "more", state.step)[:, factor.shape[1] :]], dim=1)

    def draw(self, matrix: Matrix, rows: int, rank: int, *key: int | str) -> Tensor:
        """Gaussian columns of length 1, the same on all ranks."""
        gaussian = seeded_gaussian(rows, rank, self.settings.seed, matrix.key, *key)
        return normalize_columns(gaussian.to(matrix.slot.parameter.device, matrix.dtype))[0]

    def renew(
        self, layout: Layout, side: str, stacks: Sequence[Tensor], old: Sequence[Tensor], step: int
    ) -> list[Tensor]:
        """Factors for the next step: columns of length 1, dead ones drawn anew; a gradient of zero leaves ``old``.

        Args:
            layout: of this step.
            side: which factors.
            stacks: as `Layout.stacks` gives them, turned back: ``(k, rows, rank)``.
            old: what this step started from, one a matrix.
            step: its number.
        """
        units, living = zip(*normalize_stacks(stacks), strict=True)
        factors = layout.each(units, side)
        if bool(torch.cat([alive.reshape(-1) for alive in living]).all()):
            return factors
        renewed: list[Tensor] = []
        for matrix, before, unit, alive in zip(self.matrices, old, factors, layout.each(living, side), strict=True):
            if not bool(alive.any()):
                unit = before
            elif not bool(alive.all()):
                unit = torch.where(alive, unit, self.draw(matrix, *unit.shape, step + 1))
            renewed.append(unit)
        return renewed

    def share(
        self, extra: Sequence[Tensor], factors: Tensor, state: State, phase: int
    ) -> Generator[Request, Tensor, tuple[Tensor, Sent] | None]:
        """Average ``extra`` exactly and ``factors`` in the wire's dtype, in one round."""
        numel = sum(part.numel() for part in extra)
        if self.settings.wire_dtype is None:
            payload = torch.cat([*extra, factors])
            yield payload
            return payload[:numel], Sent(payload[numel:], factors)
        parts = [Coded(factors, FloatCodec(self.settings.wire_dtype))]
        if numel > 0:
            parts.append(Coded(torch.cat(list(extra)), PlainCodec()))
        sent = yield from coded_average(parts, self._place, state.step, phase)
        if not all(all_finite(s.average) for s in sent):
            return None
        return sent[1].average if numel > 0 else factors[:0], sent[0]

    def payload(self, inputs: Sequence[Operand], numel: int) -> Tensor:
        """Room for factors."""
        return torch.empty(numel, dtype=self.matrices[0].dtype, device=inputs[0].device)

    def _rank(self, matrix: Matrix, state: State) -> int:
        energy = self.settings.energy
        return matrix.rank if energy is None else min(matrix.rank, energy.rank(state.factors.get(matrix.key)))

    def _bytes(self, state: State) -> tuple[int, int]:
        return self._raw, sum(self._sent_bytes(matrix, state) for matrix in self.matrices)

    def _sent_bytes(self, matrix: Matrix, state: State) -> int:
        dtype = self.settings.wire_dtype or matrix.dtype
        return self.sent_numbers(matrix, self._rank(matrix, state), state.step) * dtype.itemsize

    def _commit(
        self,
        slot: Slot,
        own: Sequence[tuple[Operand, Factors]],
        gradient: Tensor,
        gradient_norm: float | None,
        state: State,
    ) -> None:
        """Write the average into the gradient, and what this rank did not send into its residual."""
        measured = gradient_norm is not None and state.figures is not None
        input_norm = math.hypot(*(operand.norm() for operand, _ in own)) if measured else 0.0
        room = self.settings.memory.room(slot, gradient, state)
        in_place = room is gradient
        for operand, factors in own:
            if in_place:
                operand.subtract(factors.own_left, factors.own_right)
            else:
                operand.settle(factors.left, factors.right, factors.own_left, factors.own_right, room)
        if gradient_norm is not None and state.figures is not None:
            raw = slot.parameter.numel() * slot.parameter.element_size()
            sent = sum(self._sent_bytes(operand.matrix, state) for operand, _ in own)
            state.figures[slot.name] = Figures(gradient_norm, input_norm, _norm(room), raw, sent)
        self.settings.memory.keep(slot, room, state)
        for operand, factors in own:
            if in_place:
                operand.deliver(factors.left, factors.right)
            if factors.next is not None:
                state.factors[operand.matrix.key] = pack(factors.next, self.settings.factor_dtype)

    def _overflow(self, outcome: Factorised) -> bool:
        """Whether any P Qᵀ has an element beyond the range of its gradient. Alike on all ranks, as both factors are."""
        columns = max(factors.left.shape[0] for factors in outcome.factors)
        largest = float(outcome.last.abs().amax())
        dtypes = [matrix.slot.parameter.dtype for matrix in self.matrices]
        if largest * columns * 2 < min(torch.finfo(dtype).max for dtype in set(dtypes)):
            return False
        products = ((f.left.mT @ f.right).to(dtype) for f, dtype in zip(outcome.factors, dtypes, strict=True))
        return not all(bool(torch.isfinite(product).all()) for product in products)

    def _norms(self, outcome: Factorised, state: State) -> dict[str, Tensor]:
        """Norms of P Qᵀ by parameter name: those of the factor that came last, as the other is orthonormal."""
        stacks = self.layout(state).stacks(outcome.last, outcome.side)
        each = [torch.linalg.vector_norm(stack, dim=(1, 2)) for stack in stacks]
        norms: dict[str, Tensor] = {}
        for matrix, norm in zip(self.matrices, self.layout(state).each(each, outcome.side), strict=True):
            name = matrix.slot.name
            norms[name] = torch.hypot(norms[name], norm) if name in norms else norm
        return norms


def _norms(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: _norm(gradient) for name, gradient in gradients.items()}


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
