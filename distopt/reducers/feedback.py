"""Error feedback for any way of compressing: the base of every reducer that sends less than it is given.

Source: Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019 (arXiv:1901.09847), algorithm 2.
"""

import abc
import math
from collections.abc import Generator, Mapping, Sequence

import torch
from torch import Tensor

from distopt.comm.requests import Request
from distopt.numerics.finite import all_finite
from distopt.reducers.allreduce import split_into
from distopt.reducers.coded import Sent
from distopt.reducers.memory import Memory, flush, forget, working_dtype
from distopt.reducers.reducer import Bucket, Figures, Place, Plan, Proposal, Reduction, Slot, State


class FeedbackPlan(Plan):
    """Compresses some gradients of a bucket, averages the others exactly, and keeps what was not sent.

    A reducer of your own needs `compress`, and `bytes_of` for the statistics: docs/reducers.md shows one.

    Args:
        slots: of the bucket.
        compressed: which of them are compressed, one a slot; the others are sent whole.
        place: of this rank.
    """

    def __init__(self, slots: Sequence[Slot], compressed: Sequence[bool], place: Place) -> None:
        self.place = place
        self._chosen = [i for i, chosen in enumerate(compressed) if chosen]
        self._whole = [i for i, chosen in enumerate(compressed) if not chosen]
        self._slots = [slots[i] for i in self._chosen]
        self._whole_slots = [slots[i] for i in self._whole]
        self._optional = any(slot.optional for slot in self._slots)
        self._memory = Memory()

    @abc.abstractmethod
    def compress(
        self, slots: Sequence[Slot], inputs: Sequence[Tensor], state: State
    ) -> Generator[Request, Tensor, Sequence[Sent]]:
        """Average ``inputs`` over the ranks, roughly, in one round.

        Args:
            slots: whose they are, not empty.
            inputs: gradient plus residual, one a slot, float32 or float64, in the parameter's shape. Not to be changed.
            state: to read the step from.

        Returns:
            One `Sent` a slot, in the parameter's shape: the average, and what this rank put into it. Their conservation
            is the law: ``own`` averaged over the ranks is ``average``.
        """

    def bytes_of(self, slot: Slot) -> int:
        """Bytes that are sent in the place of one gradient."""
        return slot.parameter.numel() * slot.parameter.element_size()

    def reduce(self, bucket: Bucket, state: State) -> Reduction:
        """See `Plan.reduce`."""
        gradients = [bucket.gradients[i] for i in self._chosen]
        segments = [bucket.segments[i] for i in self._whole]
        flushed = flush(self._whole_slots, [bucket.gradients[i] for i in self._whole], state)
        present = torch.stack([g.any() for g in gradients]).to(gradients[0].dtype) if self._optional else None
        whole = _payload([*segments, *([] if present is None else [present])])
        if whole is not None:
            whole = yield whole
        norms = [_norm(g) if state.figures is not None else 0.0 for g in gradients]
        sent: Sequence[Sent] = []
        if self._slots:
            pairs = zip(self._slots, gradients, strict=True)
            inputs = [self._memory.add_into(slot, gradient, state) for slot, gradient in pairs]
            if not _finite(inputs):
                # What is sent may leave the bad number out: it must show wherever one looks.
                inputs = [torch.full_like(tensor, math.nan) for tensor in inputs]
            sent = yield from self.compress(self._slots, inputs, state)
        averages = [s.average.to(g.dtype) for s, g in zip(sent, gradients, strict=True)]
        if not _finite(averages):
            return None
        count = 0 if present is None else len(present)
        used = whole[len(whole) - count :].tolist() if count and whole is not None else [1.0] * len(gradients)

        def commit() -> None:
            if whole is not None:
                split_into(segments, whole[: len(whole) - count])
            forget(flushed, state)
            for i, slot in enumerate(self._slots):
                if used[i]:
                    self._commit(slot, gradients[i], sent[i], averages[i], norms[i], state)
                else:
                    gradients[i].zero_()

        return Proposal(commit, self._bytes())

    def residual_shapes(self) -> Mapping[str, Sequence[int]]:
        """See `Plan.residual_shapes`."""
        return {slot.name: slot.parameter.shape for slot in self._slots}

    def prepare(self, state: State) -> None:
        """See `Plan.prepare`."""
        for slot in self._slots:
            if slot.name not in state.residuals:
                self._memory.keep(slot, torch.zeros_like(slot.parameter, dtype=working_dtype(slot)), state)

    def _commit(self, slot: Slot, gradient: Tensor, sent: Sent, average: Tensor, norm: float, state: State) -> None:
        error = self._memory.input_again(slot, gradient, state)
        input_norm = _norm(error) if state.figures is not None else 0.0
        error.sub_(sent.own)
        if average.dtype != sent.average.dtype:
            error.add_(sent.average - average)
        gradient.copy_(average)
        self._memory.keep(slot, error, state)
        if state.figures is not None:
            raw = slot.parameter.numel() * slot.parameter.element_size()
            state.figures[slot.name] = Figures(norm, input_norm, _norm(error), raw, self.bytes_of(slot))

    def _bytes(self) -> tuple[int, int]:
        raw = sum(slot.parameter.numel() * slot.parameter.element_size() for slot in self._slots)
        return raw, sum(self.bytes_of(slot) for slot in self._slots)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _payload(parts: Sequence[Tensor]) -> Tensor | None:
    """What is averaged exactly: gradients sent whole, and which gradients there are at all."""
    whole = torch.cat(list(parts)) if parts else None
    return whole if whole is not None and len(whole) > 0 else None


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all are; on an accelerator the host waits once, not once a tensor."""
    sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    return not sums or all_finite(torch.stack(sums)) or all(all_finite(tensor) for tensor in tensors)
