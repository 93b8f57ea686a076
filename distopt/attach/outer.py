"""What a round of local training does with the average of the ranks: the outer optimizer.

Source: Douillard et al. 2023, DiLoCo (arXiv:2311.08105), algorithm 1. The outer gradient is how far the ranks moved on
average, backwards: the old global parameters minus the mean of the new local ones.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from distopt.attach.replicas import as_real, widened
from distopt.errors import SettingError, StateError
from distopt.numerics.finite import all_finite


@dataclasses.dataclass(frozen=True)
class Nesterov:
    """SGD with Nesterov momentum on the outer gradient: what ``torch.optim.SGD(nesterov=True)`` does with it.

    ``lr=1, momentum=0`` sets the parameters to their mean, as no outer optimizer does.

    Args:
        lr: outer learning rate, above 0; 0.7 in the paper.
        momentum: at least 0 and below 1; 0.9 in the paper.

    Raises:
        SettingError: if a setting is out of its range.

    Example:
        >>> Nesterov(lr=0.7)
        Nesterov(lr=0.7, momentum=0.9)
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not _is_number(self.lr) or self.lr <= 0:
            raise SettingError("Nesterov.lr", self.lr, "a finite number above 0")
        if not _is_number(self.momentum) or not 0 <= self.momentum < 1:
            raise SettingError("Nesterov.momentum", self.momentum, "a number of at least 0 and below 1")

    def next_velocity(self, velocity: Tensor, gradient: Tensor) -> Tensor:
        """Take an outer gradient into the momentum.

        Args:
            velocity: momentum so far, zeros before the first round.
            gradient: the outer gradient, of the same shape and dtype.

        Returns:
            The new velocity; nothing is changed in place.
        """
        return velocity.mul(self.momentum).add_(gradient)

    def next_parameter(self, parameter: Tensor, gradient: Tensor, velocity: Tensor) -> Tensor:
        """Step from the old global parameter.

        Args:
            parameter: the global parameter.
            gradient: the outer gradient, of the same shape and dtype.
            velocity: the one that `next_velocity` has returned for this gradient.

        Returns:
            The new global parameter; nothing is changed in place.
        """
        return parameter.add(gradient.add(velocity, alpha=self.momentum), alpha=-self.lr)


class GlobalModel:
    """What the ranks agreed on at the end of the last round, and the momentum of the steps that led there.

    Args:
        parameters: the averaged parameters by name; copied.
        buffers: the averaged buffers by name; copied. They are set to their mean whatever the outer optimizer is: it
            could make a variance negative.
        outer: the outer optimizer; ``None`` sets the parameters to their mean too.
    """

    def __init__(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], outer: Nesterov | None) -> None:
        self._outer = outer
        self._trained = frozenset(parameters)
        self.tensors = {name: tensor.detach().clone() for name, tensor in {**parameters, **buffers}.items()}
        """By name, each in the model's own dtype and the same on all ranks."""
        momentum = outer is not None and outer.momentum > 0
        self.velocity = {n: torch.zeros_like(p, dtype=widened(p.dtype)) for n, p in parameters.items() if momentum}
        """Outer momentum by name of the parameter, in float32 at least; none if the outer optimizer keeps none."""

    def movements(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How far this rank has moved, backwards: ``global - local`` by name, 1-D, real, in float32 at least."""
        return {
            name: as_real(self.tensors[name].to(widened(tensor.dtype)) - tensor).reshape(-1)
            for name, tensor in local.items()
            if tensor.numel()
        }

    def take(self, local: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> bool:
        """Step to new global tensors, here and in the model.

        The proposal is written over the local tensors, which are of no more use: no further copy of the model is made.

        Args:
            local: the model's own tensors by name.
            moved: the mean of `movements` over the ranks by name; what is not there stays as it is.

        Returns:
            Whether the step was taken. If not, because a number would not be finite, nothing but ``local`` has changed.
        """
        for name, mean in moved.items():
            old = as_real(self.tensors[name]).to(mean.dtype)
            as_real(local[name]).copy_(self._proposal(name, old, mean.view(old.shape)))
        if not all(all_finite(local[name]) for name in moved):
            return False
        for name, mean in moved.items():
            if self._outer is not None and name in self.velocity:
                velocity = as_real(self.velocity[name])
                velocity.copy_(self._outer.next_velocity(velocity, mean.view(velocity.shape)))
            self.tensors[name].copy_(local[name])
        return True

    def restore(self, local: Mapping[str, Tensor]) -> None:
        """Put the model back to where the last round ended."""
        for name, tensor in local.items():
            tensor.copy_(self.tensors[name])

    def check(self, tensors: Mapping[str, Tensor], velocity: Mapping[str, Tensor]) -> None:
        """Raise a `StateError` unless these could take the place of ours; a state without momentum can."""
        for ours, theirs in ((self.tensors, tensors), (self.velocity, velocity or self.velocity)):
            for name in sorted(ours.keys() | theirs.keys()):
                here, there = _kind(ours.get(name)), _kind(theirs.get(name))
                if here != there:
                    what = f"the momentum of {name!r}" if theirs is velocity else repr(name)
                    raise StateError(
                        f"the state is of another model or outer optimizer: {what} is {there} there, {here} here"
                    )

    def load(self, tensors: Mapping[str, Tensor], velocity: Mapping[str, Tensor]) -> None:
        """Take over what passed `check`; without momentum in it, ours begins anew."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        for name, tensor in self.velocity.items():
            tensor.copy_(velocity[name]) if velocity else tensor.zero_()

    def _proposal(self, name: str, old: Tensor, mean: Tensor) -> Tensor:
        if self._outer is None or name not in self._trained:
            return old - mean
        velocity = self.velocity.get(name)
        if velocity is None:
            return self._outer.next_parameter(old, mean, torch.zeros_like(mean))
        return self._outer.next_parameter(old, mean, self._outer.next_velocity(as_real(velocity), mean))


def _kind(tensor: Tensor | None) -> str:
    return "not kept" if tensor is None else f"{tensor.dtype} of {tuple(tensor.shape)}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
