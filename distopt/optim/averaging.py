"""The average of the iterates, kept away from the device that trains."""

import copy
import itertools
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.swa_utils import get_ema_multi_avg_fn

from distopt.errors import SettingError, StateError
from distopt.optim.carrier import Carrier, carrier_between
from distopt.optim.settings import check_count, check_number
from distopt.optim.update import widest


class IterateAverage:
    """An exponential average of a model's parameters, updated every few steps on another device.

    Every ``every`` steps, ``average = decay * average + (1 - decay) * parameters``; the first time the parameters are
    copied. The average is kept in the parameters' precision, at least float32. Buffers are not averaged but copied, as
    by ``torch.optim.swa_utils.AveragedModel``.

    From CUDA to the CPU the parameters travel on a stream of their own into pinned memory, and a thread averages them;
    neither the host nor the device waits. Only the next optimizer step (of any ``torch.optim.Optimizer``) waits for
    the copy, on the device. Between other devices `update` copies at once.

    Ranks that hold the same parameters get the same average: one of them is enough.

    Args:
        model: what is trained; DDP and ``torch.compile`` are seen through.
        decay: at least 0 and below 1; 0.99 in the paper.
        every: steps between two updates of the average; 25 in the paper.
        device: where the average is kept.
        warmup: use ``min(decay, (1 + n) / (10 + n))`` for the n-th update, so that early parameters are soon forgotten.

    Raises:
        SettingError: a setting is out of its range.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> average = IterateAverage(model, decay=0.5, every=1)
        >>> for value in (1.0, 3.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     average.update()
        >>> average.module.weight[0, 0].item()
        2.0

    Source: Ramesh et al. 2021 (arXiv:2102.12092), appendix B.2.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.99,
        every: int = 25,
        device: torch.device | str = "cpu",
        warmup: bool = False,
    ) -> None:
        check_number("IterateAverage.decay", decay, 0, 1)
        check_count("IterateAverage.every", every, 1)
        self._model = model = unwrapped(model)
        self._decay, self._every, self._warmup = decay, every, warmup
        self._module = _copied(model, torch.device(device))
        self._buffers = list(self._module.buffers())
        self._average = [p.detach().to(widest(p.dtype)) for p in self._module.parameters()]
        if not self._average:
            raise SettingError("IterateAverage.model", type(model).__name__, "a module that has parameters")
        self._updates = self._averages = 0
        self._pending: Future[None] | None = None
        self._carrier = carrier_between(self._trained(), torch.device(device))
        if self._carrier is not None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="distopt-average")
            weakref.finalize(self, register_optimizer_step_pre_hook(_guard(self._carrier)).remove)

    def update(self) -> None:
        """Count an optimizer step; every so many, take the parameters into the average."""
        self._updates += 1
        if self._updates % self._every:
            return
        self._wait()
        decay = min(self._decay, (1 + self._averages) / (10 + self._averages)) if self._warmup else self._decay
        decay = decay if self._averages else 0.0
        self._averages += 1
        if self._carrier is None:
            self._take(self._trained(), decay)
            return
        carrier = self._carrier
        carrier.start(self._trained())
        self._pending = self._thread.submit(lambda: self._take(carrier.arrived(), decay))

    @property
    def module(self) -> nn.Module:
        """The model with averaged parameters, after all updates so far. It is the same object at every call."""
        self._wait()
        with torch.no_grad():
            for parameter, average in zip(self._module.parameters(), self._average, strict=True):
                if parameter.dtype != average.dtype:
                    parameter.copy_(average)
        return self._module

    def state_dict(self) -> dict[str, Any]:
        """Give the counts and the average by the names of the plain model; not collective."""
        self._wait()
        return {"updates": self._updates, "averages": self._averages, "average": self._by_name()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            StateError: it is of another model. Nothing has changed then.
        """
        self._wait()
        ours, theirs = self._by_name(), state["average"]
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
                raise StateError(f"the state is of another model: {name!r} is not the same in both")
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(theirs[name])
        self._updates, self._averages = state["updates"], state["averages"]

    def _trained(self) -> list[Tensor]:
        """Parameters and buffers as they are now: both may be replaced."""
        return [*self._model.parameters(), *self._model.buffers()]

    @torch.no_grad()
    def _take(self, tensors: list[Tensor], decay: float) -> None:
        """Average parameters, and copy the buffers behind them."""
        count = len(self._average)
        current = [
            tensor.to(average.device, average.dtype)
            for tensor, average in zip(tensors[:count], self._average, strict=True)
        ]
        get_ema_multi_avg_fn(decay)(self._average, current, 0)
        for ours, theirs in zip(self._buffers, tensors[count:], strict=True):
            ours.copy_(theirs)

    def _wait(self) -> None:
        """Let the thread finish, and raise what went wrong there."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _by_name(self) -> dict[str, Tensor]:
        names = [name for name, _ in itertools.chain(self._module.named_parameters(), self._module.named_buffers())]
        return dict(zip(names, [*self._average, *self._buffers], strict=True))


def unwrapped(model: nn.Module) -> nn.Module:
    """Give the user's own module out of DDP and ``torch.compile``.

    Example:
        >>> unwrapped(nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _copied(model: nn.Module, device: torch.device) -> nn.Module:
    """Copy a model to a device without a second copy on its own."""
    placed: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        there = tensor.detach().to(device, copy=True)
        placed[id(tensor)] = (
            nn.Parameter(there, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
        )
    return copy.deepcopy(model, placed).to(device)


def _guard(carrier: Carrier) -> Any:
    """A hook that does not keep the carrier alive."""
    weak = weakref.ref(carrier)

    def before_step(*_: Any) -> None:
        if (alive := weak()) is not None:
            alive.guard()

    return before_step
