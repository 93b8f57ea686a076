"""A step as a transaction: every rank takes it, or no rank does."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.profiler import record_function

from distopt.comm.communicator import Communicator
from distopt.comm.requests import Request
from distopt.numerics.finite import all_finite
from distopt.reducers.reducer import Proposal, Reduction


class Transaction:
    """Carries out the reductions of one step, and puts their outcome in force together or not at all.

    No rank needs to be asked whether a step is sound: what is averaged is the same on all ranks, and a non-finite
    number on one of them makes it non-finite. So all ranks drop the same step, without a collective of its own.

    Args:
        communicator: the ranks to average over.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._proposals: list[Proposal] = []
        self.sound = True
        """Whether everything averaged so far was finite. The same on all ranks."""

    def propose(self, reduction: Reduction) -> None:
        """Carry out a reduction as far as its proposal; after the step has turned out unsound, do nothing."""
        if not self.sound:
            return
        proposal = self._negotiate(reduction)
        if proposal is None:
            self.sound = False
        else:
            self._proposals.append(proposal)

    def commit(self) -> tuple[int, int]:
        """Put every proposal in force; to be called once, and only if the step is `sound`.

        Returns:
            Bytes of the gradients that were compressed, before and after.
        """
        with _labelled("distopt::decompress"):
            for proposal in self._proposals:
                proposal.commit()
        before, after = zip((0, 0), *(p.bytes_compressed for p in self._proposals), strict=True)
        return sum(before), sum(after)

    def norms(self) -> dict[str, Tensor]:
        """Norms of averaged gradients by parameter name, as far as the reductions know them."""
        return {name: norm for proposal in self._proposals for name, norm in proposal.norms.items()}

    def _negotiate(self, reduction: Reduction) -> Proposal | None:
        try:
            request = _compress(reduction, None)
            while True:
                with _labelled("distopt::communicate"):
                    answer = self._communicator.answer(request)
                if isinstance(request, Tensor) and not all_finite(answer):
                    reduction.close()
                    return None
                request = _compress(reduction, answer)
        except StopIteration as returned:
            return returned.value


def _labelled(name: str) -> contextlib.AbstractContextManager[object]:
    """A label for the profiler, which costs some microseconds even where there is none."""
    return record_function(name) if torch.autograd.profiler._is_profiler_enabled else _NOTHING  # pyright: ignore


_NOTHING = contextlib.nullcontext()


def _compress(reduction: Reduction, answer: Tensor | None) -> Request:
    with _labelled("distopt::compress"):
        return next(reduction) if answer is None else reduction.send(answer)


def spoil(gradients: Iterator[Tensor]) -> None:
    """Make every gradient of a dropped step NaN, so that whatever guards the optimizer skips it on every rank."""
    for gradient in gradients:
        gradient.fill_(float("nan"))
