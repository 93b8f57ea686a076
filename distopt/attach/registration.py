"""One reducer at work on one model: its state, its figures, and how both are saved."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from distopt.attach.accumulating import check_fusible
from distopt.attach.clipping import clip_
from distopt.attach.engine import Engine
from distopt.attach.saving import (
    FORMAT,
    average_residuals,
    check_state,
    gather_factors,
    hand_over,
    mean_tally,
    own_residuals,
    restore,
    restore_own,
)
from distopt.errors import RegistrationError, SettingError, StateError
from distopt.numerics.storage import unpack
from distopt.reducers.reducer import Figures, Reducer


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
        residual_norm: Euclidean norm of what this rank has not sent yet, by parameter name, in the unit of unscaled
            gradients.
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
        """Fraction of the bytes removed, ``1 - bytes_sent / bytes_uncompressed``; 0 before the first step."""
        return _saving(self.bytes_sent, self.bytes_uncompressed)

    @property
    def matrix_saving(self) -> float:
        """The same over the parameters that are compressed."""
        return _saving(self.matrix_bytes_sent, self.matrix_bytes_uncompressed)


class Attachment(Protocol):
    """What a registration asks of the place where gradients are met."""

    fused: bool
    """Whether gradients are added to residuals as soon as they are there, so that they cannot be told apart."""

    def settle(self) -> None:
        """Wait until no reduction is under way."""
        ...

    def layout(self) -> list[list[str]]:
        """Names of the parameters in each bucket of the last step; empty before the first."""
        ...

    def keep_layout(self, layout: Sequence[Sequence[str]]) -> None:
        """Reduce the next steps in this layout, whatever the trainer's buckets are by then."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """What there is of ``.grad`` on this rank, by parameter name."""
        ...

    def reduce(self) -> bool:
        """Average the gradients now; tell whether the step was taken. For attachments that no trainer calls."""
        ...


class Registration:
    """One reducer at work on one model; `distopt.register` makes it.

    It is ``Stateful`` in the sense of ``torch.distributed.checkpoint``: give it to ``dcp.save`` and ``dcp.load`` as it
    is.

    Args:
        engine: what carries out the steps.
        attachment: where the gradients are met.
    """

    def __init__(self, engine: Engine, attachment: Attachment) -> None:
        self._engine = engine
        self._attachment = attachment

    def __repr__(self) -> str:
        world_size, steps = self._engine.communicator.world_size, self._engine.tally.steps
        return f"Registration({self.reducer!r}, world_size={world_size}, steps={steps})"

    @property
    def reducer(self) -> Reducer:
        """The settings at work."""
        return self._engine.reducer

    def reduce(self) -> bool:
        """Average the gradients that ``backward`` has left, where `register` was given parameters. Collective.

        Returns:
            Whether the step was taken. It was dropped, on all ranks alike, if a gradient was not finite on one of them;
            every gradient is NaN then.

        Raises:
            RegistrationError: on a DDP model, whose backward pass does this.
        """
        return self._attachment.reduce()

    def stats(self) -> Stats:
        """Tell what has been reduced, sent and kept back so far, on this rank. Not collective."""
        self._attachment.settle()
        engine = self._engine
        norms = {
            name: float(torch.linalg.vector_norm(unpack(r), dtype=torch.float64)) / engine.unit(name)
            for name, r in engine.state.residuals.items()
        }
        return Stats(**dataclasses.asdict(engine.tally), residual_norm=norms)

    def figures(self) -> Mapping[str, Figures]:
        """Tell how well each gradient was reduced in the last measured step, on this rank. Not collective.

        Returns:
            By parameter name; empty before the first step, and for what is sent whole. Which steps are measured is
            `register`'s ``measure_every``.
        """
        self._attachment.settle()
        return dict(self._engine.figures)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients down if their Euclidean norm, taken together, is above a limit.

        What `torch.nn.utils.clip_grad_norm_` does, for the gradients that were averaged: after the step is reduced, and
        after a scaler's ``unscale_``. The norm of a low-rank gradient follows from its factors; no gradient is read
        for it.

        Args:
            max_norm: the limit, above 0.

        Returns:
            The norm before, 0-dimensional, the same on all ranks; NaN if the step was dropped.

        Raises:
            SettingError: if ``max_norm`` is not above 0.

        Source: Ramesh et al. 2021 (arXiv:2102.12092), appendix E.2, step 9.
        """
        if not max_norm > 0:
            raise SettingError("max_norm", max_norm, "a number above 0")
        self._attachment.settle()
        return clip_(self._attachment.gradients(), self._engine.norms, max_norm, self._engine.shards)

    def set_reducer(self, reducer: Reducer) -> None:
        """Go on with another reducer, or with other settings of this one. Collective, between steps.

        Residuals are taken over: what is compressed from now on adds them to its next gradient, and what is sent whole
        sends them with it. Factors are fitted to a new rank.

        Args:
            reducer: the new settings, the same on all ranks.

        Raises:
            SettingError: if ``reducer`` is none, or asks something impossible of a parameter; nothing has changed then.
            AgreementError: if the ranks were given different ones.
        """
        if not isinstance(cast(object, reducer), Reducer):
            raise SettingError("reducer", reducer, "a reducer such as distopt.PowerSGD(rank=4)")
        self._attachment.settle()
        if self._attachment.fused:
            check_fusible(reducer, self._engine.communicator.world_size)
        hand_over(self._engine, moved=self._engine.use(reducer))

    def pause(self) -> None:
        """Average exactly from the next step on, as plain DDP does, bit for bit; residuals and schedules wait.

        Raises:
            RegistrationError: if `register` was given ``accumulate=True``: residuals cannot wait there.
        """
        if self._attachment.fused:
            raise RegistrationError("accumulate=True cannot be paused: set_reducer(AllReduce()) sends residuals along")
        self._attachment.settle()
        self._engine.pause(True)

    def resume(self) -> None:
        """Go on where `pause` interrupted."""
        self._attachment.settle()
        self._engine.pause(False)

    def set_loss_scale(self, loss_scale: float) -> None:
        """Tell by what the loss is multiplied from the next backward pass on, so that residuals keep their meaning.

        Args:
            loss_scale: above 0; the same on all ranks. It begins at 1.

        Raises:
            SettingError: if it is not a finite number above 0, or a ``grad_scaler`` says it already.
        """
        self._attachment.settle()
        self._engine.set_loss_scale(loss_scale)

    def check_replicas(self) -> None:
        """Compare all parameters and factors bit for bit over the ranks. Collective, between steps.

        Raises:
            AgreementError: if a bit differs; it names the tensor and, with three ranks or more, the odd one.
        """
        self._attachment.settle()
        self._engine.check_replicas()

    def state_dict(self) -> dict[str, Any]:
        """Give everything that decides the future, as plain tensors and numbers by parameter name. Collective.

        Every rank must call it, between steps. It replaces each residual by its mean over the ranks: the reductions of
        PowerSGD depend on the mean alone, so one copy is enough to go on at any world size, and the run that saved and
        the run that resumes agree bit for bit at the same one.

        Returns:
            A new dictionary, the same on every rank, that ``torch.load(..., weights_only=True)`` accepts. Residuals are
            in the unit of unscaled gradients, float32 (float64 for float64 gradients) whatever they are kept in.
            Settings are not part of it: neither the reducer's nor whether it is paused. Byte counts are the mean of all
            ranks'. Of a sharded model residuals are whole, and on the CPU. Factors belong to one piece of a parameter
            each: with another number of shards they are drawn anew, and nothing is lost by that.
        """
        self._attachment.settle()
        layout = self._attachment.layout()
        self._attachment.keep_layout(layout)
        engine = self._engine
        return {
            "format": FORMAT,
            "reducer": repr(engine.reducer),
            "step": engine.state.step,
            "layout": layout,
            "tally": mean_tally(engine),
            "residuals": average_residuals(engine),
            "factors": gather_factors(engine),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, allow_fresh: bool = False) -> None:
        """Go on from what `state_dict` returned, at any world size. Every rank calls it, with the same state.

        Args:
            state: from a registration on a model with the same parameters.
            allow_fresh: warn and begin anew, instead of raising, where the state does not fit.

        Raises:
            StateError: if the state is of another format, model or kind of reducer; nothing has been changed then. To
                go on with another reducer, load with the old one and call `set_reducer`.
        """
        self._attachment.settle()
        try:
            check_state(state, self._engine)
        except StateError as error:
            if not allow_fresh:
                raise
            warnings.warn(f"residuals and factors begin anew: {error}", stacklevel=2)
            self._engine.restart()
            self._attachment.keep_layout([])
            return
        restore(state, self._engine)
        self._attachment.keep_layout(state["layout"])

    def own_residuals(self) -> dict[str, dict[str, Any]]:
        """Give what this rank alone has: its residuals, of which `state_dict` gives the mean. Not collective.

        With these beside it a save changes nothing, and the same number of ranks goes on to the bit from any step,
        whenever the undisturbed run was saved: take them before `state_dict`, put them back after it, and save them for
        each rank (``checkpoint.PerRank``).

        Returns:
            Tensors and plain values by parameter name; tensors that the next step changes, so save or copy them first.
        """
        self._attachment.settle()
        return own_residuals(self._engine)

    def load_own_residuals(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Put this rank's residuals in force, after `load_state_dict` or `state_dict`. Not collective.

        Args:
            state: what `own_residuals` gave on the same rank, of as many ranks.

        Raises:
            StateError: it is of other parameters, shapes or formats; nothing has been changed then.
        """
        self._attachment.settle()
        restore_own(self._engine, state)


def _saving(sent: int, uncompressed: int) -> float:
    return 1 - sent / uncompressed if uncompressed else 0.0
