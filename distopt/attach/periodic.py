"""Local SGD: every rank trains by itself, and the parameters are averaged every so many steps.

Source: Stich 2018 (arXiv:1805.09767) for the mean, Lin et al. 2018 (arXiv:1808.07217) for an interval that changes on
the way, Douillard et al. 2023 (arXiv:2311.08105) for the outer optimizer.

What crosses the network is not the parameters but how far they moved: ``global - local``. Where no rank moved, nothing
changes, to the bit; and the mean loses nothing to the size of the parameters.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from distopt.attach.outer import GlobalModel, Nesterov
from distopt.attach.replicas import average, copy_from_first, named_buffers, named_parameters, persistent_buffers
from distopt.comm.agreement import agree, describe, without_addresses
from distopt.comm.communicator import Communicator
from distopt.errors import RegistrationError, SettingError, StateError
from distopt.numerics.finite import all_finite

FORMAT = 1
"""Version of what `Periodic.state_dict` returns."""

Interval = int | Callable[[int], int]

_averaged: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@dataclasses.dataclass(frozen=True)
class PeriodicStats:
    """What a `Periodic` has done so far on this rank.

    Args:
        steps: local steps counted, those that a ``GradScaler`` left out included.
        rounds: rounds of averaging; those dropped are counted.
        dropped_rounds: rounds that all ranks dropped because a number was not finite on one of them.
        bytes_uncompressed: bytes that averaging the gradients at every step would have sent.
        bytes_sent: bytes this rank handed to collectives: one copy, no ring factor, without the start.
    """

    steps: int = 0
    rounds: int = 0
    dropped_rounds: int = 0
    bytes_uncompressed: int = 0
    bytes_sent: int = 0

    @property
    def saving(self) -> float:
        """Fraction of the bytes removed, ``1 - bytes_sent / bytes_uncompressed``; 0 before the first step."""
        return 1 - self.bytes_sent / self.bytes_uncompressed if self.bytes_uncompressed else 0.0


class Periodic:
    """Average a model's parameters over the ranks every so many local steps. Collective: every rank makes one.

    It begins by giving every rank the parameters and buffers of rank 0. From then on it counts the optimizer's steps by
    a hook, and at the end of each round it averages the trainable parameters and the persistent floating-point buffers
    (statistics of batch norms; always their plain mean). 16-bit numbers are averaged in float32. Frozen parameters stay
    as they are, and so do buffers that hold infinities from the start, as masks do.

    A round is a transaction: if anything is not finite on one rank, or would not be after the outer step, every rank
    drops the round and goes back to the parameters that the last one ended with.

    If steps can be left out on single ranks, as ``GradScaler.step`` does, call `step` after each of them.

    Args:
        model: a plain module, the same on every rank, without DDP around it.
        optimizer: the one whose steps are counted; it holds parameters of the model.
        every: steps in a round, at least 1; or a callable that is given the steps counted before a round and returns
            how many it has, the same on all ranks.
        outer: what to do with the mean; ``None`` sets the parameters to it.
        process_group: whose ranks to average over, the default group if ``None``. The collectives run on a new group
            of the same ranks.

    Raises:
        SettingError: if ``every`` or ``outer`` is not allowed.
        RegistrationError: if ``torch.distributed`` is not initialised, or the model or the optimizer is not fit for it.
        AgreementError: if the ranks have different settings or models.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = nn.Linear(4, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> periodic = Periodic(model, optimizer, every=2, outer=Nesterov(lr=0.7, momentum=0.9))
        >>> for _ in range(5):
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        >>> periodic.stats().rounds
        2
        >>> periodic.remove(); dist.destroy_process_group()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        every: Interval,
        outer: Nesterov | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _check_settings(every, outer)
        _check_model(model, optimizer)
        if not dist.is_initialized():
            raise RegistrationError("torch.distributed is not initialised: call init_process_group before Periodic")
        group = process_group or cast(dist.ProcessGroup, dist.group.WORLD)
        self.model = model
        self.every = every
        self.outer = outer
        self._communicator = Communicator(group)
        self._stats = PeriodicStats()
        self._since = 0  # steps since the last round
        self._length = _length(every, 0)
        self._hook_counted = False
        with torch.no_grad():
            parameters, buffers = named_parameters(model), persistent_buffers(model)
            self._agree({**parameters, **buffers})
            copy_from_first(self._communicator, {**parameters, **buffers})
            parameters = {name: p for name, p in parameters.items() if p.requires_grad}
            buffers = {name: b for name, b in buffers.items() if _has_fractions(b) and all_finite(b)}
            _check_start(parameters)
            self._global = GlobalModel(parameters, buffers, outer)
        self._gradient_bytes = sum(p.numel() * p.element_size() for p in parameters.values())
        self._handle = optimizer.register_step_post_hook(self._on_optimizer_step)
        _averaged.add(model)

    def __repr__(self) -> str:
        return (
            f"Periodic(every={self.every!r}, outer={self.outer!r}, world_size={self._communicator.world_size}, "
            f"steps={self._stats.steps})"
        )

    def step(self) -> None:
        """Say that a training step is over, whether or not the optimizer took it.

        Needed only where single ranks may leave a step out: call it on every rank right after
        ``scaler.step(optimizer)``. It counts the step if the optimizer's hook has not, and does nothing otherwise, so
        that all ranks average in the same iteration.
        """
        if not self._hook_counted:
            self._count()
        self._hook_counted = False

    def average(self) -> None:
        """End the round now, at the end of training for example. Collective; does nothing if no step was counted."""
        if self._since:
            self._end_round()

    def remove(self) -> None:
        """Count and average no more. The model keeps its parameters as they are."""
        self._handle.remove()
        _averaged.discard(self.model)

    def stats(self) -> PeriodicStats:
        """Tell what has been counted, averaged and sent so far, on this rank. Not collective."""
        return self._stats

    def state_dict(self) -> dict[str, Any]:
        """Give everything that decides the future besides the model and its optimizer. Not collective.

        In the middle of a round the ranks' models differ: each rank saves its own model and optimizer then. Right after
        a round the models agree, and so do these states.

        Returns:
            A new dictionary of plain tensors and numbers that ``torch.load(..., weights_only=True)`` accepts.
        """
        return {
            "format": FORMAT,
            "world_size": self._communicator.world_size,
            "since": self._since,
            "length": self._length,
            "stats": dataclasses.asdict(self._stats),
            "global": {name: tensor.clone() for name, tensor in self._global.tensors.items()},
            "velocity": {name: tensor.clone() for name, tensor in self._global.velocity.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned. Every rank calls it.

        Make the `Periodic` first, which copies rank 0's parameters to all, and load the rank's model and optimizer
        after it. At the boundary of a round the averaged parameters and buffers are set to the saved ones besides.

        Args:
            state: this rank's own; from any rank, and any world size, if it was saved right after a round.

        Raises:
            StateError: if the state is of another format or model, or was saved in the middle of a round by another
                number of ranks; nothing has been changed then.
        """
        _check_state(state, self._global, self._communicator.world_size)
        self._global.load(state["global"], state["velocity"])
        self._since = state["since"]
        self._stats = PeriodicStats(**state["stats"])
        self._length = state["length"] if self._since else _length(self.every, self._stats.steps)
        self._hook_counted = False
        if not self._since:
            with torch.no_grad():
                self._global.restore(self._local())

    def _agree(self, tensors: Mapping[str, Tensor]) -> None:
        communicator = self._communicator
        facts = [("every", without_addresses(self.every)), ("outer", repr(self.outer))]
        facts += [(name, describe(tensor)) for name, tensor in tensors.items()]
        communicator.guard("the comparison of models", agree, communicator.group, facts, "setting or tensor")

    def _on_optimizer_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        self._hook_counted = True
        self._count()

    def _count(self) -> None:
        self._since += 1
        self._stats = dataclasses.replace(
            self._stats,
            steps=self._stats.steps + 1,
            bytes_uncompressed=self._stats.bytes_uncompressed + self._gradient_bytes,
        )
        if self._since >= self._length:
            self._end_round()

    @torch.no_grad()
    def _end_round(self) -> None:
        """Average what the ranks have become, and take the outer step or go back."""
        local = self._local()
        before = self._communicator.bytes_sent
        # No rank asks the others: what is averaged is the same on all, and non-finite if it was so on one of them.
        taken = self._global.take(local, average(self._communicator, self._global.movements(local)))
        if not taken:
            self._global.restore(local)
        self._since = 0
        self._length = _length(self.every, self._stats.steps)
        self._stats = dataclasses.replace(
            self._stats,
            rounds=self._stats.rounds + 1,
            dropped_rounds=self._stats.dropped_rounds + (not taken),
            bytes_sent=self._stats.bytes_sent + self._communicator.bytes_sent - before,
        )

    def _local(self) -> dict[str, Tensor]:
        """Look the averaged tensors up by name: buffers, for one, may be other objects by now."""
        parameters = named_parameters(self.model)
        found: dict[str, Tensor] = {**parameters, **named_buffers(self.model)}
        for name, known in self._global.tensors.items():
            if name not in found or (found[name].shape, found[name].dtype) != (known.shape, known.dtype):
                now = f"{found[name].dtype} of {tuple(found[name].shape)}" if name in found else "gone"
                raise RegistrationError(
                    f"{name!r} was {known.dtype} of {tuple(known.shape)} when Periodic was made and is {now} now: "
                    "remove() it and make a new one"
                )
        for name, parameter in parameters.items():
            if parameter.requires_grad and name not in self._global.tensors:
                raise RegistrationError(
                    f"{name!r} was frozen or absent when Periodic was made and is trained now: "
                    "remove() it and make a new one"
                )
        return {name: found[name].detach() for name in self._global.tensors}


def _length(every: Interval, step: int) -> int:
    length = every if isinstance(every, int) else every(step)
    if not _is_count(length):
        raise SettingError(f"Periodic.every({step})", length, "an integer of at least 1")
    return length


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_settings(every: object, outer: object) -> None:
    if not _is_count(every) and not callable(every):
        raise SettingError("Periodic.every", every, "an integer of at least 1, or a callable step -> int")
    if outer is not None and not isinstance(outer, Nesterov):
        raise SettingError("Periodic.outer", outer, "None or distopt.Nesterov(lr, momentum)")


def _check_model(model: object, optimizer: object) -> None:
    if not isinstance(model, nn.Module):
        raise RegistrationError(f"Periodic needs a torch.nn.Module, but was given {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RegistrationError(f"Periodic needs a torch.optim.Optimizer, but was given {type(optimizer).__name__}")
    if model in _averaged:
        raise RegistrationError("the model is averaged by a Periodic already: remove() that one first")
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise RegistrationError(
                "DistributedDataParallel averages gradients at every step, which leaves Periodic nothing to do: give "
                "it the plain module (or, if DDP works inside a node, ddp.module and a process_group between nodes)"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise RegistrationError("FullyShardedDataParallel keeps parts of parameters: Periodic needs whole ones")
    for name, parameter in model.named_parameters():
        if any(kind.__name__ == "DTensor" for kind in type(parameter).__mro__):  # importing it takes a second
            raise RegistrationError(f"{name!r} is a DTensor, a part of a parameter: Periodic needs whole ones")
        if is_lazy(parameter) or parameter.is_meta:
            raise RegistrationError(f"{name!r} has no values yet: run the model or load it before Periodic")
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not any(id(parameter) in trained for group in optimizer.param_groups for parameter in group["params"]):
        raise RegistrationError("the optimizer holds no trainable parameter of the model")


def _check_start(parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if not all_finite(parameter.detach()):
            raise RegistrationError(f"{name!r} is not finite on the first rank, which all ranks begin from")


def _check_state(state: Mapping[str, Any], known: GlobalModel, world_size: int) -> None:
    missing = {"format", "world_size", "since", "length", "stats", "global", "velocity"} - state.keys()
    if missing:
        raise StateError(f"not the state of a Periodic: {', '.join(sorted(missing))} is missing")
    if state["format"] != FORMAT:
        raise StateError(f"format is {state['format']!r}, but must be {FORMAT}")
    if state["since"] and state["world_size"] != world_size:
        raise StateError(
            f"the state was saved {state['since']} steps into a round of {state['world_size']} ranks, "
            f"and here are {world_size}: other numbers of ranks can load only what was saved right after a round"
        )
    known.check(state["global"], state["velocity"])


def _has_fractions(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
