"""Low-rank reduction of one bucket: what all ways of finding the factors share.

Whatever is sent whole travels with the first factors, so that a bucket takes as many rounds as there are factors to
find. Symbols as in `distopt.numerics.reference`.
"""

import abc
import math
from collections.abc import Generator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from distopt.comm.requests import Request
from distopt.numerics.codecs import FloatCodec, PlainCodec
from distopt.numerics.finite import all_finite
from distopt.numerics.gaussian import seeded_gaussian
from distopt.numerics.orthogonal import normalize_columns, normalize_stacks
from distopt.numerics.storage import pack, unpack
from distopt.reducers.allreduce import split_into
from distopt.reducers.batch import Batch, Run, planned_runs
from distopt.reducers.coded import Coded, coded_average
from distopt.reducers.factors import Factorised, Factors, LowRankSettings, norms_of, overflows
from distopt.reducers.fused import Fused, Pending, Work, is_fusible, is_sound
from distopt.reducers.matrix import Layout, Matrix
from distopt.reducers.memory import flush, forget, working_dtype
from distopt.reducers.operand import Operand
from distopt.reducers.reducer import Bucket, Figures, Place, Plan, Proposal, Reduction, Slot, State
from distopt.reducers.rooms import KEPT, Room, Shared

Units: TypeAlias = Sequence[Operand | Batch]
"""What is worked on at a time: a matrix, or several small ones."""


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
        self._fixed: dict[str, Tensor] = {}
        self._most = tuple(matrix.rank for matrix in self.matrices)
        self._raw = sum(slot.parameter.numel() * slot.parameter.element_size() for slot in self._slots)
        self._layouts: dict[tuple[tuple[int, ...], bool], Layout] = {}
        self._smallest_range = min(torch.finfo(slot.parameter.dtype).max for slot in self._slots)
        self._runs = planned_runs(slots, matrices, settings.memory) if settings.energy is None else []
        batched = {index for run in self._runs for index in run.indices}
        self._alone = [i for i in range(len(self.matrices)) if i not in batched]
        self._rooms: dict[str, Room] = {}
        self._remembered: tuple[Sequence[Tensor], dict[str, list[Tensor]]] | None = None
        fusible = is_fusible(self._slots, self.matrices, settings)
        self._fused = Fused(self._slots, self.matrices, settings) if fusible else None

    @abc.abstractmethod
    def factorise(
        self, layout: Layout, inputs: Units, extra: Sequence[Tensor], state: State
    ) -> Generator[Request, Tensor, Factorised | None]:
        """Find the factors of ``inputs``, which ``layout`` lays out, and average ``extra`` with the first of them.

        Returns:
            What came of it; ``None`` if anything averaged was not finite.
        """

    @abc.abstractmethod
    def factorise_together(
        self, layout: Layout, work: Work, extra: Sequence[Tensor], state: State
    ) -> Generator[Request, Tensor, Pending | None]:
        """As `factorise`, for all matrices at once."""

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
        norms = {n: _norm(g) for n, g in gradients.items()} if state.figures is not None else {}
        present = [float(g.any()) for g in gradients.values()] if self._optional else []
        work = None if self._fused is None else self._fused.take(bucket, gradients, self.layout(state, False), state)
        if work is not None:
            whole = (segments, flushed)
            return (yield from self._reduce_together(work, whole, gradients, norms, state))
        together = bool(self._runs) and all(run.lies_in(bucket) for run in self._runs)
        layout, runs = self.layout(state, together), self._runs if together else ()
        inputs = self._operands(gradients, state, together)
        batches = [run.take(bucket, state) for run in runs]
        outcome = yield from self.factorise(layout, [*batches, *inputs], self._extra(segments, present), state)
        if outcome is None or overflows(outcome, [unit.matrix for unit in (*batches, *inputs)], self._smallest_range):
            return None
        whole, used = outcome.whole, dict[str, float]()
        if present:
            whole, flags = whole.split_with_sizes([whole.numel() - len(present), len(present)])
            used = dict(zip(gradients, flags.tolist(), strict=True))

        def commit() -> None:
            split_into(segments, whole)
            forget(flushed, state)
            for run, batch, factors in zip(runs, batches, outcome.factors, strict=False):
                self._commit_run(run, batch, factors, norms, state)
            alone: dict[str, list[tuple[Operand, Factors]]] = {}
            for operand, factors in zip(inputs, outcome.factors[len(runs) :], strict=True):
                alone.setdefault(operand.matrix.slot.name, []).append((operand, factors))
            for name, own in alone.items():
                if used.get(name, 1.0):
                    self._commit(own[0][0].matrix.slot, own, gradients[name], norms.get(name), state)
                else:
                    gradients[name].zero_()
            self._keep_factors(outcome.following, used, state)

        # A step may leave optional parameters without a gradient: what their factors say is not delivered then.
        delivered = {} if present else norms_of(outcome, layout, self.matrices)
        return Proposal(commit, self._bytes(state), delivered)

    def _reduce_together(
        self,
        work: Work,
        whole: tuple[Sequence[Tensor], Sequence[str]],
        gradients: Mapping[str, Tensor],
        norms: Mapping[str, float],
        state: State,
    ) -> Reduction:
        """`reduce`, where all matrices are worked on at once; ``whole`` is what is sent whole, and what to forget."""
        layout, (segments, flushed) = self.layout(state, False), whole
        pending = yield from self.factorise_together(layout, work, self._extra(segments, []), state)
        if pending is None:
            return None
        flags = work.inspect(pending)

        def commit() -> None:
            split_into(segments, pending.whole)
            forget(flushed, state)
            before = work.norms(gradients) if state.figures is not None else {}
            work.settle(pending.factors, flags, state)
            if state.figures is not None:
                after = work.residual_norms()
                for slot in self._slots:
                    name, raw = slot.name, slot.parameter.numel() * slot.parameter.element_size()
                    sent = sum(self._sent_bytes(m, state) for m in self.matrices if m.slot is slot)
                    state.figures[name] = Figures(norms[name], before[name], after[name], raw, sent)
            self._keep_factors(pending.following, {}, state)

        outcome = Factorised(pending.whole, [], pending.side, pending.last, pending.stacks, pending.following)
        return Proposal(commit, self._bytes(state), norms_of(outcome, layout, self.matrices), is_sound(flags))

    def _extra(self, segments: Sequence[Tensor], present: Sequence[float]) -> list[Tensor]:
        """What is averaged exactly: gradients sent whole, and which of the others there are at all."""
        dtype, device = self.matrices[0].dtype, self.matrices[0].slot.parameter.device
        flags = [torch.tensor(present, dtype=dtype, device=device)] if present else []
        return [*(segment if segment.dtype == dtype else segment.to(dtype) for segment in segments), *flags]

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

    def layout(self, state: State, together: bool) -> Layout:
        """Where the factors of this step lie; units are the runs, if they are worked on together, and then the rest."""
        ranks = self._most if self.settings.energy is None else tuple(self._rank(m, state) for m in self.matrices)
        if (ranks, together) not in self._layouts:
            units = [*(run.indices for run in self._runs), *([i] for i in self._alone)] if together else None
            self._layouts[ranks, together] = Layout(self.matrices, ranks, units)
        return self._layouts[ranks, together]

    def recalled(self, state: State) -> tuple[Sequence[Tensor], dict[str, list[Tensor]]] | None:
        """The kept factors, one a matrix and as stacks, if they are still those that this plan left behind."""
        if self._remembered is None:
            return None
        factors = state.factors
        mine = all(factors.get(m.key) is t for m, t in zip(self.matrices, self._remembered[0], strict=True))
        return self._remembered if mine else None

    def remember(self, tensors: Sequence[Tensor], stacks: dict[str, list[Tensor]] | None) -> None:
        """Note the stacks whose parts the factors ``tensors`` are, so that they need not be put together again."""
        exact = stacks is not None and self.settings.factor_dtype is None and self.settings.energy is None
        self._remembered = (tensors, stacks) if stacks is not None and exact else None

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
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Factors for the next step: columns of length 1, dead ones drawn anew; a gradient of zero leaves ``old``.

        Args:
            layout: of this step.
            side: which factors.
            stacks: as `Layout.stacks` gives them, turned back: ``(k, rows, rank)``.
            old: what this step started from, one a matrix.
            step: its number.

        Returns:
            One factor a matrix, and the stacks that they are parts of, where none had to be drawn.
        """
        units, living = zip(*normalize_stacks(stacks), strict=True)
        factors = layout.each(units, side)
        if bool((living[0] if len(living) == 1 else torch.cat([alive.reshape(-1) for alive in living])).all()):
            return factors, [unit.mT for unit in units]
        renewed: list[Tensor] = []
        for matrix, before, unit, alive in zip(self.matrices, old, factors, layout.each(living, side), strict=True):
            if not bool(alive.any()):
                unit = before
            elif not bool(alive.all()):
                unit = torch.where(alive, unit, self.draw(matrix, *unit.shape, step + 1))
            renewed.append(unit)
        return renewed, None

    def share(
        self, extra: Sequence[Tensor], room: Room, side: str, state: State
    ) -> Generator[Request, Tensor, Shared | None]:
        """Average ``extra`` exactly and the factors in ``room`` in the wire's dtype, in one round.

        Returns:
            What came of it, good for this step; ``None`` if anything averaged was not finite.
        """
        if self.settings.wire_dtype is None:
            payload = room.load(extra)
            yield payload
            # Choosing a rank takes decompositions, which refuse NaN; an accelerator's averages are not looked at yet.
            if self.settings.energy is not None and payload.device.type != "cpu" and not all_finite(payload):
                return None
            return room.shared()
        parts = [Coded(room.own, FloatCodec(self.settings.wire_dtype))]
        if room.extra > 0:
            parts.append(Coded(torch.cat(list(extra)), PlainCodec()))
        sent = yield from coded_average(parts, self._place, state.step, ("left", "right").index(side))
        if not all(all_finite(s.average) for s in sent):
            return None
        whole, layout = sent[1].average if room.extra > 0 else room.own[:0], room.layout
        average, own = sent[0]
        stacks, views = layout.stacks(average, side), layout.views(average, side)
        return Shared(whole, average, stacks, views, own, layout.views(own, side))

    def room(self, layout: Layout, side: str, extra: Sequence[Tensor] = (), *, keeps_own: bool = True) -> Room:
        """Memory for the factors of a side, and for what travels with them: that of the step before, if it fits."""
        numel = sum(part.numel() for part in extra)
        room = self._rooms.get(side)
        if room is None or room.layout is not layout or room.extra != numel:
            first = self.matrices[0]
            like = torch.empty(0, dtype=first.dtype, device=first.slot.parameter.device)
            room = Room(layout, side, numel, like, keeps_own=keeps_own)
            if numel <= KEPT:  # what is sent whole may be most of a model
                self._rooms[side] = room
        return room

    def _rank(self, matrix: Matrix, state: State) -> int:
        energy = self.settings.energy
        return matrix.rank if energy is None else min(matrix.rank, energy.rank(state.factors.get(matrix.key)))

    def _bytes(self, state: State) -> tuple[int, int]:
        return self._raw, sum(self._sent_bytes(matrix, state) for matrix in self.matrices)

    def _operands(self, gradients: Mapping[str, Tensor], state: State, together: bool) -> list[Operand]:
        matrices = [self.matrices[i] for i in self._alone] if together else self.matrices
        return [Operand(m, gradients[m.slot.name], state.residuals.get(m.slot.name)) for m in matrices]

    def _commit_run(self, run: Run, batch: Batch, factors: Factors, norms: Mapping[str, float], state: State) -> None:
        """What `_commit` does, for several matrices."""
        input_norms = batch.norms() if state.figures is not None else []
        batch.settle(*factors, run.room(state))
        residual_norms = run.keep(state)
        if state.figures is None or residual_norms is None:
            return
        for member, before, after in zip(run.members, input_norms, residual_norms, strict=True):
            name, parameter = member.matrix.slot.name, member.matrix.slot.parameter
            raw, sent = parameter.numel() * parameter.element_size(), self._sent_bytes(member.matrix, state)
            state.figures[name] = Figures(norms[name], before, after, raw, sent)

    def _keep_factors(self, following: Sequence[Tensor | None], used: Mapping[str, float], state: State) -> None:
        for matrix, factor in zip(self.matrices, following, strict=True):
            if factor is not None and used.get(matrix.slot.name, 1.0):
                state.factors[matrix.key] = pack(factor, self.settings.factor_dtype)

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
        if in_place:
            for operand, factors in own:
                operand.deliver(factors.left, factors.right)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
