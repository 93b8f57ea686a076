"""How parameters are cut over the ranks of a node, and what these ranks do together."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from distopt.comm.communicator import Communicator
from distopt.comm.requests import Gather
from distopt.errors import AgreementError


class Cut(NamedTuple):
    """How one parameter is cut: as `torch.chunk` would, so that the last pieces may be shorter, or empty."""

    shape: tuple[int, ...]  # of the whole
    dim: int

    def step(self, count: int) -> int:
        """Length of all pieces along ``dim`` but the last ones, if there are ``count``."""
        return math.ceil(self.shape[self.dim] / count)

    def length(self, index: int, count: int) -> int:
        """Length of one piece along ``dim``."""
        return max(0, min(self.step(count), self.shape[self.dim] - index * self.step(count)))

    def piece(self, index: int, count: int) -> tuple[int, ...]:
        """Shape of one piece.

        Example:
            >>> Cut((5, 7), 0).piece(0, 4), Cut((5, 7), 0).piece(2, 4), Cut((5, 7), 0).piece(3, 4)
            ((2, 7), (1, 7), (0, 7))
        """
        return (*self.shape[: self.dim], self.length(index, count), *self.shape[self.dim + 1 :])


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
        cut = self.cuts[name]
        begin = min(self.index * cut.step(self.count), whole.shape[cut.dim])
        return whole.narrow(cut.dim, begin, cut.length(self.index, self.count))

    def whole(self, name: str, mine: Tensor) -> Tensor:
        """The tensor that the ranks of a replica hold one piece of each. Collective.

        Args:
            name: the parameter's.
            mine: this rank's piece.

        Returns:
            The same on every rank of the replica.
        """
        cut = self.cuts[name]
        dim, step = cut.dim, cut.step(self.count)
        padded = mine.new_zeros([step if i == dim else side for i, side in enumerate(mine.shape)])
        padded.narrow(dim, 0, mine.shape[dim]).copy_(mine)
        if padded.numel() == 0:
            return mine.new_zeros(cut.shape)
        pieces = self.communicator.answer(Gather(padded, returning=True))
        lengths = [cut.length(rank, self.count) for rank in range(self.count)]
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


def piece_of(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor, in its memory; anything else as it is."""
    # By what it can do: importing the class takes time, which nobody pays whose models are whole.
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor
