"""Process groups of our own, and the few collectives that reducers need."""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.comm.agreement import device_of
from distopt.comm.requests import Gather, Request, Swap, Within
from distopt.comm.witness import Witness
from distopt.errors import DistoptError, PeerLostError


class Pending:
    """A collective under way.

    Args:
        work: the backend's handle of it.
        answer: what holds the outcome when it is over.
        blaming: names the rank to blame for an error raised inside of it.
    """

    def __init__(
        self, work: dist.Work, answer: Tensor, blaming: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._work = work
        self._answer = answer
        self._blaming = blaming

    def wait(self) -> Tensor:
        """Wait for the outcome; on an accelerator the current stream does.

        Raises:
            PeerLostError: as in `Communicator.guard`.
        """
        with self._blaming():
            self._work.wait()
        return self._answer


class Communicator:
    """Averages tensors over a process group that nobody else talks on.

    The group has the ranks and the backend of the one it is made from, so that our collectives can never be matched
    with those of the trainer (DDP sends its map of unused parameters and its buffers while gradients are on their way).

    Args:
        process_group: whose ranks to average over. Every one of them makes its communicator at the same point.
        ranks: some of its ranks, by their number in the world; all of them if ``None``.
        timeout: how long a collective may take; as long as the backend sees fit if ``None``.
        witness: finds out why a collective failed; one of its own if ``None``.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        *,
        ranks: Sequence[int] | None = None,
        timeout: timedelta | None = None,
        witness: Witness | None = None,
    ) -> None:
        self.ranks = list(ranks or dist.get_process_group_ranks(process_group))
        """The members, by their number in the world."""
        self.timeout = timeout
        backend = dist.get_backend(process_group)
        self.group: dist.ProcessGroup = dist.new_group(  # pyright: ignore[reportAttributeAccessIssue]
            self.ranks, timeout=timeout, backend=backend, use_local_synchronization=True
        )
        self.rank = self.ranks.index(dist.get_rank())
        self.world_size = len(self.ranks)
        self.bytes_sent = 0
        """Bytes handed to collectives so far by this rank: one copy, no ring factor, no way back."""
        self.step = 0
        """For messages: which step the collectives belong to."""
        self._witness = witness or Witness(self.group)
        self._parts: dict[str, Communicator] = {}

    def divide(self, parts: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Make the groups that `Within` speaks of. Collective.

        Args:
            parts: by name, how the ranks ``0 .. world_size - 1`` fall into groups; every rank is in one of each name.
        """
        self._parts = {
            name: Communicator(
                self.group,
                ranks=[self.ranks[i] for i in next(group for group in groups if self.rank in group)],
                timeout=self.timeout,
                witness=self._witness,
            )
            for name, groups in parts.items()
        }
        self._witness.watch([part.group for part in self._parts.values()])

    def answer(self, request: Request) -> Tensor:
        """Carry out what a reduction asks for; every rank of the group asks for the like."""
        return self.start(request).wait()

    def start(self, request: Request) -> Pending:
        """Begin what a reduction asks for. Several may be under way, begun in the same order on every rank.

        The request's tensor is the collective's until that is over.
        """
        if isinstance(request, Within):
            part = self._parts[request.part]
            part.step, before = self.step, part.bytes_sent
            pending = part.start(request.request)
            self.bytes_sent += part.bytes_sent - before
            return pending
        if isinstance(request, Swap):
            return self._swap(request.rows)
        if isinstance(request, Gather):
            return self._gather(request)
        return self._average(request)

    def average_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its average over the ranks, bitwise the same on each of them.

        Every rank divides before the sum, which 16-bit numbers would not survive otherwise; this is also how
        ``DistributedDataParallel`` does it, to the bit.

        Args:
            tensor: contiguous, floating point or complex, of the same shape and dtype on every rank.

        Returns:
            ``tensor`` itself.
        """
        return self._average(tensor).wait()

    def maximum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its elementwise maximum over the ranks.

        Args:
            tensor: contiguous, real, finite, of the same shape and dtype on every rank.

        Returns:
            ``tensor`` itself.
        """
        self.guard("an all-reduce", dist.all_reduce, tensor, op=dist.ReduceOp.MAX, group=self.group)
        self._count(tensor)
        return tensor

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by the first rank's, to the bit; contiguous, of any dtype. Not counted."""
        wire = tensor.view(-1).view(torch.uint8)
        self.guard("a broadcast", dist.broadcast, wire, src=self.ranks[0], group=self.group)

    def gather_objects(self, value: Any) -> list[Any]:
        """Give what every rank has, in the order of ranks; anything that pickles. For what is rare and small."""
        values: list[Any] = [None] * self.world_size
        self.guard("an all-gather", dist.all_gather_object, values, value, group=self.group)
        return values

    def gather_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Give every rank's numbers, in the order of ranks and in float64; as many on every rank. Not counted."""
        mine = torch.tensor(numbers, dtype=torch.float64, device=device_of(self.group))
        everyone = mine.new_empty((self.world_size, mine.numel()))
        self.guard("an all-gather", dist.all_gather, list(everyone.unbind()), mine, group=self.group)
        return everyone.tolist()

    def guard(self, what: str, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a collective; if it fails, find out why.

        Args:
            what: what it is, for the message.
            collective: what to call, on this communicator's group.
            args: what it is given.
            kwargs: by name.

        Raises:
            PeerLostError: on every rank, with the rank that is to blame. The group is of no use any more.
        """
        with self._blaming(what, self._witness.begin(self.step)):
            return collective(*args, **kwargs)

    def blame(self, error: RuntimeError, what: str) -> PeerLostError:
        """Find out why a collective failed, one of ours or one that the trainer issued on these ranks.

        Args:
            error: what the backend raised.
            what: what failed, for the message.

        Returns:
            What to raise; see `guard`.
        """
        return self._witness.blame(error, what)

    def _average(self, tensor: Tensor) -> Pending:
        tensor.mul_(1.0 / self.world_size)
        wire = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        self._count(tensor)
        return self._begun("an all-reduce", tensor, dist.all_reduce, wire)

    def _swap(self, rows: Tensor) -> Pending:
        answer = torch.empty_like(rows)
        self._count(rows)
        return self._begun("an all-to-all", answer, dist.all_to_all_single, answer, rows)

    def _gather(self, request: Gather) -> Pending:
        tensor = request.tensor
        answer = tensor.new_empty((self.world_size, *tensor.shape))
        # all_gather_into_tensor is called all_gather_single from torch 2.13 on; gloo takes one dimension only.
        name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        gather = cast(Callable[..., Any], getattr(dist, name))
        if not request.returning:
            self._count(tensor)
        return self._begun("an all-gather", answer, gather, answer.view(-1), tensor.reshape(-1))

    def _begun(self, what: str, answer: Tensor, collective: Callable[..., Any], *args: Tensor) -> Pending:
        number = self._witness.begin(self.step)
        with self._blaming(what, number):
            work = collective(*args, group=self.group, async_op=True)
        return Pending(work, answer, lambda: self._blaming(what, number))

    @contextlib.contextmanager
    def _blaming(self, what: str, number: int) -> Generator[None]:
        """Find out why a collective fails in here."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, DistoptError):
                raise
            raise self._witness.blame(error, what, number) from error

    def _count(self, tensor: Tensor) -> None:
        self.bytes_sent += tensor.numel() * tensor.element_size()
