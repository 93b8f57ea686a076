"""How parameters are cut over the ranks of a node, and what these ranks do together."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt.comm.communicator import Communicator
from distopt.comm.requests import Gather
from distopt.errors import AgreementError


class Cut(NamedTuple):
    """How one parameter is cut: as `torch.chunk` would, so that the last pieces may be shorter, or empty."""

    shape: tuple[int, ...]  # of the whole
    dim: int


class Shards:
    """One rank's place among the shards.

    Args:
        communicator: the ranks that hold one replica together.
        everyone: all ranks, of all replicas.
        cuts: of every parameter, by name.
    """

    def __init__(self, communicator: Communicator, everyone: Communicator, cuts: Mapping[str, Cut]) -> None:
        self.communicator = communicator
        self.everyone = everyone
        self.cuts = cuts

    @property
    def index(self) -> int:
        """Which shard is this rank's."""
        return self.communicator.rank

    @property
    def count(self) -> int:
        """How many there are."""
        return self.communicator.world_size

    def mine(self, name: str, whole: Tensor) -> Tensor:
        """This rank's piece of a tensor that has a parameter's whole shape; not collective.

        Args:
            name: the parameter's.
            whole: on any device.
        """
        _, dim = self.cuts[name]
        begin = min(self.index * self._step(name), whole.shape[dim])
        return whole.narrow(dim, begin, self._length(name, self.index))

    def whole(self, name: str, mine: Tensor) -> Tensor:
        """The tensor that the ranks of a replica hold one piece of each. Collective.

        Args:
            name: the parameter's.
            mine: this rank's piece.

        Returns:
            The same on every rank of the replica.
        """
        _, dim = self.cuts[name]
        padded = mine.new_zeros([self._step(name) if i == dim else side for i, side in enumerate(mine.shape)])
        padded.narrow(dim, 0, mine.shape[dim]).copy_(mine)
        if padded.numel() == 0:
            return mine.new_zeros(self.cuts[name].shape)
        pieces = self.communicator.answer(Gather(padded, returning=True))
        lengths = [self._length(name, rank) for rank in range(self.count)]
        return torch.cat([p.narrow(dim, 0, length) for p, length in zip(pieces, lengths, strict=True)], dim)

    def norm(self, norm: Tensor) -> Tensor:
        """The norm of something whole from the norm of this rank's pieces. Collective.

        Args:
            norm: 0-dimensional.
        """
        squares = norm.square().view(1)
        return (self.communicator.average_(squares)[0] * self.count).sqrt()

    def agree(self, sound: bool, error: Exception | None, device: torch.device) -> bool:
        """Tell whether a step is sound on every rank of every replica. Collective.

        Args:
            sound: whether it is on this rank.
            error: why this rank could not take part.
            device: where numbers of all ranks can be added up.

        Raises:
            AgreementError: if another rank has an error.
            Exception: this rank's own.
        """
        found = torch.tensor([float(not sound), float(error is not None)], device=device)
        self.everyone.maximum_(found)
        unsound, failed = found.tolist()
        if failed:
            told = self.everyone.gather_objects(None if error is None else str(error).partition("\n")[0])
            if error is not None:
                raise error
            odd = [rank for rank, text in zip(self.everyone.ranks, told, strict=True) if text is not None]
            raise AgreementError(next(text for text in told if text is not None), odd)
        return not unsound

    def anywhere(self, here: list[bool], device: torch.device) -> list[bool]:
        """Tell what any rank of the replica has. Collective.

        Args:
            here: what this one has.
            device: where numbers of these ranks can be added up.
        """
        found = torch.tensor([float(flag) for flag in here], device=device)
        return [flag > 0 for flag in (self.communicator.maximum_(found) if here else found).tolist()]

    def gather(self, value: Any) -> list[Any]:
        """What every shard has, in their order. Collective."""
        return self.communicator.gather_objects(value)

    def _step(self, name: str) -> int:
        shape, dim = self.cuts[name]
        return math.ceil(shape[dim] / self.count)

    def _length(self, name: str, rank: int) -> int:
        shape, dim = self.cuts[name]
        return max(0, min(self._step(name), shape[dim] - rank * self._step(name)))
