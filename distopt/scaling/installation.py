"""Putting scales into the backward pass of a model's branches."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from distopt.attach.overriding import override_forward
from distopt.attach.units import GradientScaling, declare, withdraw
from distopt.errors import RegistrationError
from distopt.scaling.boundary import enter, leave
from distopt.scaling.branches import Branch


@dataclass(frozen=True)
class Place:
    """Where a parameter belongs.

    Args:
        index: the number of its branch.
        name: what messages call it.
        narrow: whether it has less than 32 bits, so that its gradient stays scaled.
    """

    index: int
    name: str
    narrow: bool


class Gauge:
    """What the backward pass reads of the scales, and what it leaves behind: one element a branch, on the device.

    Args:
        count: number of branches.
        device: where they are.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.scale = torch.ones(count, device=device)
        self.inverse = torch.ones(count, device=device)
        self.peak = torch.zeros(count, device=device)
        """Largest absolute value of the scaled parameter gradients since `clear`; not finite if one was not."""
        self.zeros = torch.zeros(count, device=device)
        """Zeros among them, while ``counting``."""
        self.numbers = [0] * count
        """Gradient entries looked at while ``counting``."""
        self.counting = False
        self.seen: set[int] = set()
        """Parameters that have had a gradient so far, by ``id``."""

    def set(self, log2: Tensor) -> None:
        """Take over scales, rounded down to powers of two, which no gradient loses a bit by."""
        whole = log2.floor()
        self.scale.copy_(torch.exp2(whole))
        self.inverse.copy_(torch.exp2(-whole))

    def clear(self, *, counting: bool) -> None:
        """Begin a new step."""
        self.peak.zero_()
        self.counting = counting
        if counting:
            self.zeros.zero_()
            self.numbers = [0] * len(self.numbers)

    def look(self, index: int, parameter: Tensor, gradient: Tensor) -> None:
        """Note a parameter's gradient. The host does not wait for it."""
        self.seen.add(id(parameter))
        if gradient.numel() == 0:
            return
        largest = torch.linalg.vector_norm(
            gradient, torch.inf, dtype=torch.promote_types(gradient.dtype, torch.float32)
        )
        self.peak[index].copy_(torch.maximum(self.peak[index], largest))
        if self.counting:
            self.zeros[index] += (gradient == 0).sum()
            self.numbers[index] += gradient.numel()


class Installation:
    """Branches that run in 16 bits, with their gradients scaled inside.

    Every module of a branch runs under ``torch.autocast``, whatever its parameters are; float32 gradients of
    parameters are unscaled as soon as backward has them, 16-bit ones stay scaled, for they would underflow.

    Args:
        branches: where.
        dtype: the 16-bit format; float32 runs the branches as they are.
        gauge: scales and findings, in the order of ``branches``.
        scaling: who knows the scales.
    """

    def __init__(self, branches: Sequence[Branch], dtype: torch.dtype, gauge: Gauge, scaling: GradientScaling) -> None:
        self._gauge = gauge
        self._dtype = dtype
        self._undo: list[Callable[[], None]] = []
        self.places: dict[int, Place] = {}
        """The branches' parameters, by ``id``."""
        for index, branch in enumerate(branches):
            for module in branch.modules:
                self._run_in_16_bits(module, index, module is branch.modules[0], module is branch.modules[-1])
            for name, parameter in branch.parameters().items():
                place = self.places[id(parameter)] = Place(index, name, torch.finfo(parameter.dtype).bits < 32)
                if parameter.requires_grad:
                    self._hook(parameter, place, scaling)

    def remove(self) -> None:
        """Leave the modules as they were."""
        while self._undo:
            self._undo.pop()()

    def _run_in_16_bits(self, module: nn.Module, index: int, first: bool, last: bool) -> None:
        gauge, dtype = self._gauge, self._dtype

        def entering(x: Any) -> Any:
            return enter(x, gauge.inverse[index]) if _is_floating(x) and x.requires_grad else x

        def leaving(y: Any) -> Any:
            return leave(y, gauge.scale[index]) if _is_floating(y) else y

        def around(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if first:
                args, kwargs = pytree.tree_map(entering, (args, kwargs))
            with _autocast(gauge.scale.device, dtype):
                output = inner(*args, **kwargs)
            return pytree.tree_map(leaving, output) if last else output

        self._undo.append(override_forward(module, around))

    def _hook(self, parameter: nn.Parameter, place: Place, scaling: GradientScaling) -> None:
        gauge = self._gauge

        def take(gradient: Tensor) -> Tensor:
            if gradient.is_sparse:
                raise RegistrationError(f"the gradient of {place.name!r} is sparse, which cannot be scaled in a branch")
            gauge.look(place.index, parameter, gradient)
            return gradient if place.narrow else gradient * gauge.inverse[place.index]

        handle: RemovableHandle = parameter.register_hook(take)
        self._undo.append(handle.remove)
        if place.narrow:
            declare(parameter, scaling, place.index)
            self._undo.append(lambda: withdraw(parameter))


def _autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
