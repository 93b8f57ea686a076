"""A registration whose model is wrapped later, or never, by a trainer that owns the wrapping."""

import logging
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt import Registration, RegistrationError, SettingError, Stats, register
from distopt.reducers.reducer import Reducer

logger = logging.getLogger(__name__)


class LateRegistration:
    """Registers a reducer when a trainer has wrapped its model, and keeps the state while there is none.

    In a world of one process nothing is wrapped and there is nothing to reduce: a state that was loaded waits, and is
    saved again as it was.

    Args:
        reducer: what averages gradients, ``distopt.PowerSGD(rank=8)`` for example.
        remedy: what to change in the trainer if its model is not ``DistributedDataParallel``, in words.
        options: keywords of `distopt.register`.

    Raises:
        SettingError: if ``reducer`` is none.

    Example:
        >>> import distopt
        >>> hook = LateRegistration(distopt.PowerSGD(rank=8), "wrap it in DDP")
        >>> hook.attach(nn.Linear(4, 4))  # one process
        >>> hook.stats().steps, hook.state_dict()
        (0, {})
    """

    def __init__(self, reducer: Reducer, remedy: str, **options: Any) -> None:
        if not isinstance(reducer, Reducer):
            raise SettingError("reducer", reducer, "a reducer such as distopt.PowerSGD(rank=4)")
        self._reducer, self._remedy, self._options = reducer, remedy, options
        self._module: nn.Module | None = None  # whose state is kept; None: whoever comes next
        self._state: Mapping[str, Any] = {}
        self._last: tuple[nn.Module, Registration] | None = None
        self.registration: Registration | None = None
        """What `distopt.register` returned; None in a world of one process, and before training."""

    def attach(self, model: nn.Module, grad_scaler: Any = None) -> None:
        """Register on the model that the trainer has wrapped, and go on from the state that waits. Collective.

        Args:
            model: what the trainer calls, compiled or not.
            grad_scaler: what multiplies the loss, if anything does.

        Raises:
            RegistrationError: if there are several processes and the model is not ``DistributedDataParallel``.
            StateError: if the state that waits is of another model or kind of reducer.
        """
        wrapped = getattr(model, "_orig_mod", model)
        if not isinstance(wrapped, DistributedDataParallel):
            if dist.is_initialized() and dist.get_world_size() > 1:
                kind = type(wrapped).__name__
                raise RegistrationError(f"a reducer needs a DistributedDataParallel model, not {kind}: {self._remedy}")
            logger.warning("one process: there is nothing to reduce, and %r waits", self._reducer)
            return
        if self._last is not None and self._last[0] is wrapped:
            registration = self._last[1]
        else:
            registration = register(wrapped, self._reducer, **{"grad_scaler": grad_scaler, **self._options})
        if self._state and self._module in (None, wrapped.module):
            registration.load_state_dict(self._state)
        self.registration, self._module, self._state = registration, wrapped.module, {}
        self._last = (wrapped, registration)

    def detach(self) -> None:
        """Await the next `attach`, of this model, wrapped anew or not, or of another, which begins anew. Collective."""
        if self.registration is not None:
            self._state = self.registration.state_dict()
            self.registration = None

    def stats(self) -> Stats:
        """What has been reduced so far on this rank; all zero where nothing is. Not collective."""
        return Stats(0, 0, 0, 0, 0, 0, {}) if self.registration is None else self.registration.stats()

    def state_dict(self) -> dict[str, Any]:
        """See `distopt.Registration.state_dict`; what waits, or nothing, where there is none. Collective."""
        return dict(self._state) if self.registration is None else self.registration.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, at once or as soon as the model is wrapped. On every rank.

        Raises:
            StateError: if the state is of another model or kind of reducer.
        """
        if self.registration is None:
            self._state, self._module = state, None
        elif state:
            self.registration.load_state_dict(state)
