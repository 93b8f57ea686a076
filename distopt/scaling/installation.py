"""Putting scales into the backward pass of a model's branches."""

import contextlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from distopt.attach.fairscale import forgets_overrides
from distopt.attach.overriding import override_forward
from distopt.attach.units import GradientScaling, declare, withdraw
from distopt.errors import RegistrationError
from distopt.scaling.boundary import enter, launchable, leave
from distopt.scaling.branches import Branch


@dataclass(eq=False)
class Place:
    """Where a parameter belongs.

    Args:
        index: the number of its branch.
        name: what messages call it.
        module: whose parameter it is.
        key: what it is called there.
        narrow: whether its gradient has less than 32 bits when it arises, so that it stays scaled.
        seen: whether it has had a gradient so far.
        met: the object whose gradients are noted.
        whole: the parameter that an optimizer has, where another object takes its place in forward.
    """

    index: int
    name: str
    module: nn.Module
    key: str
    narrow: bool = False
    seen: bool = False
    met: "weakref.ref[Tensor] | None" = None
    whole: "weakref.ref[Tensor] | None" = None

    @property
    def parameter(self) -> nn.Parameter:
        """What is there at present."""
        return getattr(self.module, self.key)


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

    def take(self, index: int, gradient: Tensor, *, narrow: bool) -> Tensor:
        """Note a parameter's gradient, and give it unscaled, or as it is if it is narrow. The host does not wait."""
        if launchable(gradient) and not self.counting:
            from distopt.kernels import scaling

            return scaling.noted(gradient, self.peak[index], None if narrow else self.inverse[index])
        self._look(index, gradient)
        return gradient if narrow else gradient * self.inverse[index]

    def _look(self, index: int, gradient: Tensor) -> None:
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
    parameters are unscaled as soon as backward has them, 16-bit ones stay scaled, for they would underflow. Parameters
    of sharded modules (`distopt.shard`) are met in forward, where they are whole.

    Args:
        branches: where.
        dtype: the 16-bit format; float32 runs the branches as they are.
        gauge: scales and findings, in the order of ``branches``.
        scaling: who knows the scales.
    """

    def __init__(self, branches: Sequence[Branch], dtype: torch.dtype, gauge: Gauge, scaling: GradientScaling) -> None:
        self._gauge = gauge
        self._dtype = dtype
        self._scaling = scaling
        self._branches = branches
        self._undo: list[Callable[[], None]] = []
        self._places: list[Place] = []
        for index, branch in enumerate(branches):
            places = [Place(index, name, module, key) for name, (module, key) in branch.owners().items()]
            self._places += places
            for place in places:
                if is_sharded(place.parameter):
                    place.whole = weakref.ref(place.parameter)
                else:
                    self._meet(place)
            for module in branch.modules:
                first, last = module is branch.modules[0], module is branch.modules[-1]
                self._run_in_16_bits(module, places if first else [], index, first, last)

    def remove(self) -> None:
        """Leave the modules as they were."""
        while self._undo:
            self._undo.pop()()

    def places(self) -> dict[int, Place]:
        """Where parameters belong, by ``id``; between steps."""
        return {id(place.parameter): place for place in self._places}

    def _run_in_16_bits(self, module: nn.Module, places: Sequence[Place], index: int, first: bool, last: bool) -> None:
        gauge = self._gauge

        def entering(x: Any) -> Any:
            return enter(x, gauge.inverse[index]) if _is_floating(x) and x.requires_grad else x

        def leaving(y: Any) -> Any:
            return leave(y, gauge.scale[index]) if _is_floating(y) else y

        def around(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if first:
                args, kwargs = pytree.tree_map(entering, (args, kwargs))
            if not torch.compiler.is_compiling():
                self._meet_new(places)
            output = self._in_autocast(inner, args, kwargs)
            return pytree.tree_map(leaving, output) if last else output

        self._undo.append(override_forward(module, around))
        for part in module.modules():
            if part is not module and forgets_overrides(part):
                self._undo.append(override_forward(part, self._in_autocast))

    def _in_autocast(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _autocast(self._gauge.scale.device, self._dtype):
            return inner(*args, **kwargs)

    def _meet_new(self, places: Sequence[Place]) -> None:
        """Meet what has taken the place of parameters, as under ``fully_shard``."""
        for place in places:
            parameter = place.parameter
            if (place.met is None or place.met() is not parameter) and not is_sharded(parameter):
                self._meet(place)

    def _meet(self, place: Place) -> None:
        parameter, replaced = place.parameter, place.met is not None and place.whole is None
        place.met = weakref.ref(parameter)
        place.narrow = torch.finfo(parameter.dtype).bits < 32
        if not parameter.requires_grad:
            return
        gauge = self._gauge

        def take(gradient: Tensor) -> Tensor:
            if gradient.is_sparse:
                raise RegistrationError(f"the gradient of {place.name!r} is sparse, which cannot be scaled in a branch")
            if not place.seen and any(map(forgets_overrides, self._branches[place.index].modules)):
                raise RegistrationError(
                    f"{place.name!r} is in a branch that checkpoint_wrapper was put on when the scaler was there: "
                    "put it on first, then make the scaler"
                )
            place.seen = True
            return gauge.take(place.index, gradient, narrow=place.narrow)

        handle: RemovableHandle = parameter.register_hook(take)
        self._undo.append(handle.remove)
        if place.narrow:
            whole = parameter if place.whole is None else place.whole()
            if whole is None or replaced:
                raise RegistrationError(f"{place.name!r} is sharded since the scaler was made: make it after shard")
            declare(whole, self._scaling, place.index)
            self._undo.append(lambda: withdraw(whole))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a parameter, or a gradient, is one rank's piece of a whole."""
    return hasattr(tensor, "to_local")


def _autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
