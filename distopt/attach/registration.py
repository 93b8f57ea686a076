"""One reducer at work on one model: its state, its figures, and how both are saved."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from distopt.comm.communicator import Communicator
from distopt.errors import StateError
from distopt.reducers.reducer import Reducer, State

FORMAT = 1
"""Version of what `Registration.state_dict` returns."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a registration has done so far on this rank.

    Args:
        steps: reductions, one a backward pass that synchronises; those dropped are counted.
        skipped_steps: steps that all ranks dropped because a gradient was not finite on one of them.
        bytes_uncompressed: bytes of the gradients handed over, in their own dtype.
        bytes_sent: bytes this rank handed to collectives: one copy, no ring factor.
        matrix_bytes_uncompressed: bytes of the gradients that were compressed.
        matrix_bytes_sent: bytes of what was sent in their place.
        residual_norm: Euclidean norm of what this rank has not sent yet, by parameter name.
    """

    steps: int
    skipped_steps: int
    bytes_uncompressed: int
    bytes_sent: int
    matrix_bytes_uncompressed: int
    matrix_bytes_sent: int
    residual_norm: Mapping[str, float]

    @property
    def saving(self) -> float:
        """Fraction of the bytes removed: ``1 - bytes_sent / bytes_uncompressed``; 0 before the first step."""
        return _saving(self.bytes_sent, self.bytes_uncompressed)

    @property
    def matrix_saving(self) -> float:
        """The same over the parameters that are compressed."""
        return _saving(self.matrix_bytes_sent, self.matrix_bytes_uncompressed)


@dataclasses.dataclass
class Tally:
    """The running figures behind `Stats`."""

    steps: int = 0
    skipped_steps: int = 0
    bytes_uncompressed: int = 0
    bytes_sent: int = 0
    matrix_bytes_uncompressed: int = 0
    matrix_bytes_sent: int = 0


Shapes = Mapping[str, Mapping[str, Sequence[int]]]
"""Shapes by kind and parameter name."""


class Attachment(Protocol):
    """What a registration asks of the place where gradients are met."""

    def settle(self) -> None:
        """Wait until no reduction is under way."""
        ...

    def layout(self) -> list[list[str]]:
        """Names of the parameters in each bucket of the last step; empty before the first."""
        ...

    def keep_layout(self, layout: Sequence[Sequence[str]]) -> None:
        """Reduce the next steps in this layout, whatever the trainer's buckets are by then."""
        ...

    def shapes(self) -> Shapes:
        """Shapes by parameter name of what is remembered (``residual``, ``factor``), and of every ``parameter``."""
        ...


class Registration:
    """One reducer at work on one model; `distopt.register` makes it.

    The attributes may be read at any time; the state is saved and loaded between steps.

    Args:
        reducer: the settings at work.
        state: residuals and factors by parameter name.
        tally: counts that the attachment keeps.
        communicator: the ranks that average.
        attachment: where the gradients are met.
    """

    def __init__(
        self, reducer: Reducer, state: State, tally: Tally, communicator: Communicator, attachment: Attachment
    ) -> None:
        self.reducer = reducer
        self._state = state
        self._tally = tally
        self._communicator = communicator
        self._attachment = attachment

    def __repr__(self) -> str:
        return f"Registration({self.reducer!r}, world_size={self._communicator.world_size}, steps={self._tally.steps})"

    def stats(self) -> Stats:
        """Tell what has been reduced, sent and kept back so far, on this rank. Not collective."""
        self._attachment.settle()
        norms = {name: float(torch.linalg.vector_norm(r)) for name, r in self._state.residuals.items()}
        return Stats(**dataclasses.asdict(self._tally), residual_norm=norms)

    def state_dict(self) -> dict[str, Any]:
        """Give everything that decides the future, as plain tensors and numbers by parameter name. Collective.

        Every rank must call it, between steps. It replaces each residual by its mean over the ranks: the reductions to
        come depend on the mean alone, so one copy is enough to go on at any world size, and the run that saved and the
        run that resumes agree bit for bit at the same one.

        Returns:
            A new dictionary, the same on every rank, that ``torch.load(..., weights_only=True)`` accepts.
        """
        self._attachment.settle()
        for name in sorted(self._state.residuals):
            self._communicator.average_(self._state.residuals[name])
        layout = self._attachment.layout()
        self._attachment.keep_layout(layout)
        return {
            "format": FORMAT,
            "reducer": repr(self.reducer),
            "step": self._state.step,
            "layout": layout,
            "tally": dataclasses.asdict(self._tally),
            "residuals": _copies(self._state.residuals),
            "factors": _copies(self._state.factors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, at any world size. Every rank calls it, with the same state.

        Args:
            state: from a registration on a model with the same parameters.

        Raises:
            StateError: if the state is of another format or model; nothing has been changed then.
        """
        self._attachment.settle()
        _check(state, self._attachment.shapes())
        self._state.step = state["step"]
        self._state.residuals = _copies(state["residuals"])
        self._state.factors = _copies(state["factors"])
        for field, value in state["tally"].items():
            setattr(self._tally, field, value)
        self._attachment.keep_layout(state["layout"])


def _saving(sent: int, uncompressed: int) -> float:
    return 1 - sent / uncompressed if uncompressed else 0.0


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _check(state: Mapping[str, Any], shapes: Shapes) -> None:
    missing = {"format", "step", "layout", "tally", "residuals", "factors"} - state.keys()
    if missing:
        raise StateError(f"not the state of a registration: {', '.join(sorted(missing))} is missing")
    if state["format"] != FORMAT:
        raise StateError(f"format is {state['format']!r}, but must be {FORMAT}")
    for name in (name for names in state["layout"] for name in names):
        if name not in shapes["parameter"]:
            raise StateError(f"the state is of another model: it has {name!r}, which this one has not")
    for kind in ("residual", "factor"):
        for name, tensor in state[kind + "s"].items():
            there, here = tuple(tensor.shape), tuple(shapes[kind].get(name, ()))
            if there != here:
                kept = f"{here} here" if here else "which is not kept here"
                raise StateError(
                    f"the state is of another model or reducer: the {kind} of {name!r} has shape {there} there, {kept}"
                )
