"""The steps of one reducer on one model, wherever its gradients are met."""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from torch import Tensor

from distopt.attach.shards import Shards
from distopt.attach.streams import keep
from distopt.attach.transaction import Transaction
from distopt.attach.units import changes, is_scaled, scale_of
from distopt.comm.agreement import Step, StepCheck, agree, describe, drift, without_addresses
from distopt.comm.communicator import Communicator
from distopt.errors import SettingError
from distopt.numerics.storage import tensors_of
from distopt.reducers.allreduce import AllReducePlan
from distopt.reducers.memory import times
from distopt.reducers.reducer import Bucket, Figures, Place, Plan, Reducer, Slot, State
from distopt.reducers.settings import is_integer, is_number


class LossScaler(Protocol):
    """What is asked of a ``torch.amp.GradScaler``, or of whatever else multiplies the loss."""

    def get_scale(self) -> float:
        """What the loss is multiplied by at present."""
        ...


@dataclasses.dataclass
class Tally:
    """The running figures behind `Stats`."""

    steps: int = 0
    skipped_steps: int = 0
    bytes_uncompressed: int = 0
    bytes_sent: int = 0
    matrix_bytes_uncompressed: int = 0
    matrix_bytes_sent: int = 0


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is looked at besides the gradients, and when to raise an alarm.

    Args:
        agreement: whether ranks compare what they are about to reduce, before each step.
        check_replicas_every: steps from one comparison of all parameters to the next; 0 for never.
        every: steps from one measured step to the next; 0 for never.
        residual_bound: ratio of a residual's norm to its gradient's beyond which a warning is given, once a parameter.
    """

    agreement: bool = True
    check_replicas_every: int = 1000
    every: int = 100
    residual_bound: float = 100.0

    def __post_init__(self) -> None:
        if not isinstance(cast(object, self.agreement), bool):
            raise SettingError("agreement", self.agreement, "True or False")
        for field, steps in (("check_replicas_every", self.check_replicas_every), ("measure_every", self.every)):
            if not is_integer(steps) or steps < 0:
                raise SettingError(field, steps, "an integer of at least 0")
        if not is_number(self.residual_bound) or not self.residual_bound > 0:
            raise SettingError("residual_bound", self.residual_bound, "a number above 0")


class Engine:
    """Plans, state and figures of one reducer at work; attachments hand it the gradients.

    Args:
        slots: every parameter, in an order that is the same on all ranks.
        reducer: the settings.
        watch: what is measured.
        grad_scaler: knows what the loss is multiplied by.
        shards: how the parameters are cut, where the slots hold pieces of them.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        reducer: Reducer,
        watch: Watch,
        grad_scaler: LossScaler | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.slots = {slot.name: slot for slot in slots}
        self.reducer = reducer
        self.state = State()
        self.adopted: State | None = None
        """The state whose tensors the thread that takes the steps is known to use; ``None`` after others came."""
        self.tally = Tally()
        self.shards = shards
        self.paused = False
        self._units: dict[str, float] = {}
        self._followed: tuple[float, int] | None = None
        """The loss scale and the declarations that the residuals follow already."""
        self._scaled: Sequence[str] = ()
        """Those whose gradients are scaled on their own besides."""
        self._loss_scale = 1.0
        self._grad_scaler = grad_scaler
        self.figures: Mapping[str, Figures] = {}
        """Of the last measured step."""
        self.norms: dict[str, Tensor] = {}
        """Norms of averaged gradients of the last step, by name, unscaled, where the reduction gave them away."""
        self.joined = 0
        """Ranks that have run out of inputs (torch's ``Join``), in the step under way."""
        self.communicator: Communicator
        """Set by `connect`."""
        self._step_check: StepCheck
        self._parts: Mapping[str, Sequence[Sequence[int]]] = {}
        self._sent_before = 0
        self._watch = watch
        self._warned: set[str] = set()
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._transaction: Transaction | None = None

    def check(self, reducer: Reducer, world_size: int) -> None:
        """Fail now, not in backward, if a setting does not fit a parameter."""
        reducer.parts(world_size)
        for slot in self.slots.values():
            reducer.plan([slot], Place(0, world_size))

    def connect(self, communicator: Communicator) -> None:
        """Begin to talk, once all ranks are known to have the same parameters and settings. Collective."""
        self.communicator = communicator
        facts = [(name, describe(slot.parameter)) for name, slot in self.slots.items()]
        communicator.guard("the comparison of parameters", agree, communicator.group, facts, "parameter")
        # What decides which collectives there are; the rest of the watch is each rank's own affair.
        watched = [(name, str(getattr(self._watch, name))) for name in ("agreement", "check_replicas_every")]
        communicator.guard("the comparison of settings", agree, communicator.group, watched, "setting")
        self._step_check = StepCheck(communicator.group)
        self.pause(False)
        self._settle_on(self.reducer)

    def use(self, reducer: Reducer) -> bool:
        """Go on with another reducer. Collective.

        Returns:
            Whether other ranks have to keep the state from now on.
        """
        self.check(reducer, self.communicator.world_size)
        before = self._parts
        self._settle_on(reducer)
        return self._parts != before

    def _settle_on(self, reducer: Reducer) -> None:
        communicator, facts = self.communicator, [("reducer", without_addresses(reducer))]
        communicator.guard("the comparison of settings", agree, communicator.group, facts, "setting")
        # A callable, or what a module is made of, does not show in the settings' text.
        plans = self._described(reducer)
        communicator.guard("the comparison of plans", agree, communicator.group, plans, "the reduction of parameter")
        self.reducer = reducer
        self._plans.clear()
        parts = reducer.parts(communicator.world_size)
        if parts != self._parts:
            self._parts = parts
            communicator.divide(parts)

    def _described(self, reducer: Reducer) -> list[tuple[str, str]]:
        world = self.communicator.world_size
        places = [Place(rank, world) for rank in (range(world) if reducer.parts(world) else (0,))]
        return [
            (name, " ".join(reducer.plan([slot], place).describe() for place in places))
            for name, slot in self.slots.items()
        ]

    @property
    def divided(self) -> bool:
        """Whether ranks share the parameters between them, so that each keeps the state of some only."""
        return bool(self._parts)

    def pause(self, paused: bool) -> None:
        """See `Registration.pause`."""
        self.paused = paused
        self._step_check.restate([("paused", str(paused))])

    def check_replicas(self) -> None:
        """See `Registration.check_replicas`."""
        communicator = self.communicator
        tensors = {name: slot.parameter.detach() for name, slot in self.slots.items()}
        if not self.divided:
            tensors |= {f"the factor of {name}": tensors_of(factor)[0] for name, factor in self.state.factors.items()}
        communicator.guard("the comparison of replicas", drift, communicator.group, tensors)

    def prepare(self, state: State) -> None:
        """Put everything that this rank will keep into ``state``, where it is missing."""
        for slot in self.slots.values():
            self.reducer.plan([slot], self._place).prepare(state)

    def shapes(self) -> tuple[dict[str, Sequence[int]], dict[str, Sequence[int]]]:
        """Shapes of the residuals and of the factors that any rank keeps, by name; -1 for what varies."""
        world = self.communicator.world_size
        places = [Place(rank, world) for rank in range(world)] if self.divided else [self._place]
        residuals: dict[str, Sequence[int]] = {}
        factors: dict[str, Sequence[int]] = {}
        for slot in self.slots.values():
            for place in places:
                plan = self.reducer.plan([slot], place)
                residuals.update(plan.residual_shapes())
                factors.update(plan.factor_shapes())
        return residuals, factors

    def whole_shape(self, slot: Slot) -> Sequence[int]:
        """Shape of a parameter, of all shards together."""
        return slot.parameter.shape if self.shards is None else self.shards.cuts[slot.name].shape

    def restart(self, state: State | None = None) -> None:
        """Go on from another state, in unscaled units; from nothing if there is none."""
        self.state = state or State()
        self._units.clear()
        self._followed = None

    def begin(self, names: tuple[str, ...], forwards: int = 0, *, joining: bool = False) -> None:
        """Open a step, once all ranks are known to do the same.

        Args:
            names: the parameters that it begins with.
            forwards: forward passes since the last step; 0 if that is not known.
            joining: whether ranks may run out of inputs, so that they have to be counted.
        """
        if self._transaction is not None:  # of a pass that raised half way
            self._transaction.call_off()
        self.communicator.step = self.tally.steps
        if self.adopted is not self.state:
            self.adopted = self.state
            kept = [*self.state.residuals.values(), *self.state.factors.values()]
            keep(tensor for stored in kept for tensor in tensors_of(stored))
        loss_scale = self.follow_scales()
        if self._watch.agreement or joining:
            step = Step(self.tally.steps, names, forwards, loss_scale)
            self.joined = self.communicator.guard("the comparison of steps", self._step_check, step)
        every = self._watch.check_replicas_every
        # A rank that has joined takes no optimizer steps: it is given the others' parameters in the end.
        if every > 0 and self.tally.steps % every == 0 and self.joined == 0:
            self.check_replicas()
        measured = self._watch.every > 0 and self.state.step % self._watch.every == 0 and not self.paused
        self.state.figures = {} if measured else None
        self._transaction = Transaction(self.communicator)
        self._sent_before = self.communicator.bytes_sent

    def propose(
        self, names: tuple[str, ...], gradients: Sequence[Tensor], segments: Sequence[Tensor], flat: Tensor | None
    ) -> None:
        """Begin to reduce some gradients, and go on with those before them."""
        assert self._transaction is not None
        whole = [flat] if flat is not None else gradients
        self.tally.bytes_uncompressed += sum(tensor.nbytes for tensor in whole)
        self._transaction.propose(self._plan(names).reduce(Bucket(gradients, segments, flat), self.state))

    def complete(self) -> bool:
        """Reduce everything as far as can be before the whole step is known.

        Returns:
            Whether all that was averaged in the step is finite; the same on all ranks of the communicator.
        """
        assert self._transaction is not None
        return self._transaction.complete()

    def finish(self, agreed: bool = True) -> bool:
        """Take the step, or drop it; tell which.

        Args:
            agreed: whether ranks outside of the communicator take it as well.
        """
        assert self._transaction is not None
        taken = self._transaction.complete() and agreed
        transaction, self._transaction = self._transaction, None
        tally = self.tally
        tally.steps += 1
        self.norms = {}
        if taken:
            raw, sent = transaction.commit()
            units = ((name, norm, self.unit(name)) for name, norm in transaction.norms().items())
            self.norms = {name: norm if unit == 1 else norm / unit for name, norm, unit in units}
            tally.matrix_bytes_uncompressed += raw
            tally.matrix_bytes_sent += sent
            self.state.step += 0 if self.paused else 1
            self._look()
        else:
            tally.skipped_steps += 1
        tally.bytes_sent += self.communicator.bytes_sent - self._sent_before
        return taken

    def set_loss_scale(self, loss_scale: float) -> None:
        """See `Registration.set_loss_scale`."""
        if self._grad_scaler is not None:
            raise SettingError("loss_scale", loss_scale, "left to the grad_scaler that register was given")
        if not is_number(loss_scale) or not 0 < loss_scale < math.inf:
            raise SettingError("loss_scale", loss_scale, "a finite number above 0")
        self._loss_scale = loss_scale

    def unit(self, name: str) -> float:
        """What the residual of a parameter is scaled by at present."""
        return self._units.get(name, 1.0)

    def follow_scales(self) -> float:
        """Express the residuals in the units that gradients have at present; gives what the loss is multiplied by."""
        loss_scale = self._loss_scale if self._grad_scaler is None else self._grad_scaler.get_scale()
        residuals = self.state.residuals
        followed = (loss_scale, changes())
        if followed != self._followed:
            self._followed = followed
            self._scaled = [name for name, slot in self.slots.items() if is_scaled(slot.parameter)]
            names = list(self.slots)
        else:
            names = self._scaled
        for name in names:
            unit = loss_scale * scale_of(self.slots[name].parameter)
            if name in residuals and unit != self.unit(name):
                residuals[name] = times(residuals[name], unit / self.unit(name))
            self._units[name] = unit
        return loss_scale

    @property
    def _place(self) -> Place:
        return Place(self.communicator.rank, self.communicator.world_size)

    def _plan(self, names: tuple[str, ...]) -> Plan:
        if self.paused:
            return AllReducePlan()
        plan = self._plans.get(names)
        if plan is None:
            # With nobody to send to there is nothing to save: the only replica's gradients stay exact.
            alone = self.shards is not None and self.communicator.world_size == 1
            slots = [self.slots[name] for name in names]
            plan = self._plans[names] = AllReducePlan(slots) if alone else self.reducer.plan(slots, self._place)
        return plan

    def _look(self) -> None:
        """Keep the figures of a measured step, and warn of residuals that have grown too large."""
        if self.state.figures is None:
            return
        self.figures, self.state.figures = self.state.figures, None
        for name, figures in self.figures.items():
            grown = 0 < figures.gradient_norm * self._watch.residual_bound < figures.residual_norm
            if grown and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"the residual of {name!r} is {figures.residual_ratio:.3g} times its gradient, beyond the bound of "
                    f"{self._watch.residual_bound:g}: compress it less, or send it whole",
                    stacklevel=2,
                )
