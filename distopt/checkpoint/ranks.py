"""What one rank fails at fails on all of them: the ranks go from one part of a save or load to the next together."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from distopt.comm.agreement import agree
from distopt.comm.communicator import Communicator
from distopt.comm.meeting import communicator_of
from distopt.errors import CheckpointError, DistoptError, PeerLostError

T = TypeVar("T")


class Ranks:
    """All ranks of the world, or this process alone where torch.distributed is not initialised.

    Example:
        >>> Ranks().together(lambda: 3)
        3
    """

    def __init__(self) -> None:
        self._communicator = _everyone()
        self.rank = 0 if self._communicator is None else self._communicator.rank
        """This rank's number."""
        self.count = 1 if self._communicator is None else self._communicator.world_size
        """How many they are."""

    def agree(self, facts: Sequence[tuple[str, str]]) -> None:
        """Check that all ranks save or load the same things. Collective.

        Raises:
            AgreementError: on every rank, if they do not.
        """
        if self._communicator is not None:
            agree(self._communicator.group, facts, "argument")

    def gather(self, value: Any) -> list[Any]:
        """Give what every rank has. Collective."""
        return [value] if self._communicator is None else self._communicator.gather_objects(value)

    def together(self, work: Callable[[], T]) -> T:
        """Do this rank's part of something, and wait for the others' parts. Collective.

        Args:
            work: calls no collective that it could fail to reach.

        Returns:
            What ``work`` returns here.

        Raises:
            DistoptError: on every rank, if ``work`` fails on any, with one line that names the rank.
        """
        problem, result = None, None
        try:
            result = work()
        except PeerLostError:
            raise  # There is nobody left to tell.
        except Exception as error:
            problem = error
        for rank, text in enumerate(self.gather(None if problem is None else one_line(problem))):
            if text is not None:
                if isinstance(problem, DistoptError):
                    raise problem
                where = f"rank {rank}: " if self.count > 1 else ""
                raise CheckpointError(f"{where}{text}") from problem
        return result  # pyright: ignore[reportReturnType]

    def first(self, work: Callable[[], T]) -> T:
        """Do something on the first rank only, and give what came out of it to all. Collective.

        Args:
            work: returns something small that pickles.

        Raises:
            DistoptError: on every rank, if it fails.
        """
        result = self.together(lambda: work() if self.rank == 0 else None)
        return self.gather(result)[0]


def _everyone() -> Communicator | None:
    if not (dist.is_available() and dist.is_initialized()) or dist.group.WORLD is None:
        return None
    return communicator_of(dist.group.WORLD)


def one_line(error: Exception) -> str:
    r"""What an error says, in one line of bearable length.

    Example:
        >>> one_line(ValueError("a tensor\n  is missing"))
        'ValueError: a tensor is missing'
    """
    text = " ".join(str(error).split())
    text = text if len(text) < 400 else f"{text[:400]}..."
    return text if isinstance(error, DistoptError) else f"{type(error).__name__}: {text}"
