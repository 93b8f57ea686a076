"""A step as a transaction: every rank takes it, or no rank does.

The buckets of a step overlap: while what one of them asked for is under way, the next is compressed. What is begun is
begun in an order that only the buckets' own order and their requests decide, never what happens to have arrived:
collectives meet their partners by that order.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Generator, Iterator

import torch
from torch import Tensor
from torch.profiler import record_function

from distopt.comm.communicator import Communicator, Pending
from distopt.comm.requests import Request, Within
from distopt.errors import PeerLostError
from distopt.numerics.finite import all_finite, largest
from distopt.reducers.reducer import Proposal, Reduction


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A reduction that waits for an answer."""

    number: int  # of the bucket in its step
    reduction: Reduction
    request: Request
    pending: Pending


class Transaction:
    """Carries out the reductions of one step, and puts their outcome in force together or not at all.

    No rank needs to be asked whether a step is sound: what is averaged is the same on all ranks, and a non-finite
    number on one of them makes it non-finite. So all ranks drop the same step, without a collective of its own.

    With each bucket that comes, its first request is begun, and then each earlier bucket goes on by one answer, in the
    order in which these were asked for. Two rounds a bucket make P0, P1 Q0, P2 Q1, ..., Q of the last one.

    An accelerator is asked once whether all was finite, when everything is enqueued: a step goes on until then,
    whatever its numbers.

    Args:
        communicator: the ranks to average over.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._flights: collections.deque[_Flight] = collections.deque()
        self._proposals: list[Proposal | None] = []
        self._unread: list[Tensor] = []
        """On an accelerator: numbers that are finite if the step is sound."""
        self._flags: list[Tensor] = []
        """Likewise, what the proposals say of themselves."""
        self.sound = True
        """Whether everything averaged so far was finite. The same on all ranks."""

    def propose(self, reduction: Reduction) -> None:
        """Begin a reduction, and go on with those before it; after the step has turned out unsound, do nothing."""
        if not self.sound:
            return
        earlier = len(self._flights)
        self._proposals.append(None)
        with self._calling_off():
            self._advance(len(self._proposals) - 1, reduction, None)
            for _ in range(earlier):
                self._land()

    def complete(self) -> bool:
        """Carry out all reductions as far as their proposals; tell whether the step is `sound`."""
        with self._calling_off():
            while self._flights:
                self._land()
            if self._unread or self._flags:
                self._ask()
        return self.sound

    def commit(self) -> tuple[int, int]:
        """Put every proposal in force; to be called once, when all is `complete`, and only if the step is `sound`.

        Returns:
            Bytes of the gradients that were compressed, before and after.
        """
        proposals = self._complete_proposals()
        with _labelled("distopt::decompress"):
            for proposal in proposals:
                proposal.commit()
        before, after = zip((0, 0), *(p.bytes_compressed for p in proposals), strict=True)
        return sum(before), sum(after)

    def norms(self) -> dict[str, Tensor]:
        """Norms of averaged gradients by parameter name, as far as the reductions know them."""
        return {name: norm for p in self._complete_proposals() for name, norm in p.norms.items()}

    def call_off(self) -> None:
        """Wait for what is under way, whose memory belongs to others again then, and carry out nothing else."""
        self.sound = False
        while self._flights:
            flight = self._flights.popleft()
            flight.reduction.close()
            flight.pending.wait()

    def _complete_proposals(self) -> list[Proposal]:
        assert not self._flights
        return [proposal for proposal in self._proposals if proposal is not None]

    def _land(self) -> None:
        """Let the reduction that has waited longest go on by one answer."""
        if not self.sound:
            # What an unsound step has begun, it has begun on all ranks.
            self.call_off()
            return
        flight = self._flights.popleft()
        self._take(flight.number, flight.reduction, flight.request, _waited(flight.pending))

    def _take(self, number: int, reduction: Reduction, request: Request, answer: Tensor) -> None:
        if isinstance(request, Tensor) and not self._is_finite(answer):
            reduction.close()
            self.sound = False
        else:
            self._advance(number, reduction, answer)

    def _is_finite(self, answer: Tensor) -> bool:
        """Whether to go on: an accelerator's numbers are left for later."""
        if answer.device.type == "cpu":
            return all_finite(answer)
        self._unread.append(largest(answer))
        return True

    def _ask(self) -> None:
        """Wait for the accelerator, and hear whether the step is sound."""
        alike: dict[torch.dtype, list[Tensor]] = {}
        for each in (*self._unread, *self._flags):
            alike.setdefault(each.dtype, []).append(each)
        self._unread, self._flags = [], []
        place = next(iter(alike.values()))[0].device
        stacks = [torch.stack([each.to(place) for each in kind]) for kind in alike.values()]
        sound = torch.cat([stack if stack.dtype == torch.bool else stack.isfinite() for stack in stacks]).all()
        with _labelled("distopt::ask"):
            self.sound = bool(sound) and self.sound

    def _advance(self, number: int, reduction: Reduction, answer: Tensor | None) -> None:
        """Let a reduction go on up to its next request, and begin that."""
        try:
            request = _compress(reduction, answer)
        except StopIteration as returned:
            self._proposals[number] = returned.value
            if returned.value is None:
                self.sound = False
            elif returned.value.sound is not None:
                self._flags.append(returned.value.sound)
            return
        pending = self._communicator.start(request)
        if isinstance(request, Within):
            # Parts of the ranks may ask for more rounds than others: no other bucket can come in between.
            self._take(number, reduction, request, _waited(pending))
        else:
            self._flights.append(_Flight(number, reduction, request, pending))

    @contextlib.contextmanager
    def _calling_off(self) -> Generator[None]:
        """After an error, let nothing write into memory that others believe to be theirs."""
        try:
            yield
        except PeerLostError:
            raise  # the connections are closed, and with them whatever was under way
        except Exception:
            with contextlib.suppress(PeerLostError):
                self.call_off()
            raise


def _labelled(name: str) -> contextlib.AbstractContextManager[object]:
    """A label for the profiler, which costs some microseconds even where there is none."""
    return record_function(name) if torch.autograd.profiler._is_profiler_enabled else _NOTHING  # pyright: ignore


_NOTHING = contextlib.nullcontext()


def _compress(reduction: Reduction, answer: Tensor | None) -> Request:
    with _labelled("distopt::compress"):
        return next(reduction) if answer is None else reduction.send(answer)


def _waited(pending: Pending) -> Tensor:
    with _labelled("distopt::communicate"):
        return pending.wait()


def spoil(gradients: Iterator[Tensor]) -> None:
    """Make every gradient of a dropped step NaN, so that whatever guards the optimizer skips it on every rank."""
    for gradient in gradients:
        gradient.fill_(float("nan"))
