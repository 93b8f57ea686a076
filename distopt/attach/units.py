"""In which unit a parameter's gradient arrives, where somebody scales it on its way.

A residual is kept in the unit of the gradients that are added to it. Who scales the gradients of single parameters says
so here, and whoever keeps residuals of them looks here, so that neither needs to be told of the other.
"""

import weakref
from typing import Any, Protocol

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class GradientScaling(Protocol):
    """Whoever scales the gradients of some parameters."""

    def gradient_scale(self, index: int) -> float:
        """What gradients of the kind ``index`` are multiplied by at present; a power of two."""
        ...


_SCALED: Any = WeakTensorKeyDictionary()
_CHANGES = [0]


def declare(parameter: Tensor, scaling: GradientScaling, index: int) -> None:
    """Say that ``.grad`` of a parameter will be scaled when it is reduced.

    Args:
        parameter: any that requires a gradient.
        scaling: knows the scale; not kept alive by this.
        index: what to ask it for.
    """
    _SCALED[parameter] = (weakref.ref(scaling), index)
    _CHANGES[0] += 1


def withdraw(parameter: Tensor) -> None:
    """Say that ``.grad`` of a parameter is as the loss has it again."""
    _SCALED.pop(parameter, None)
    _CHANGES[0] += 1


def changes() -> int:
    """Give how often scales have been declared or withdrawn: as long as it is the same, so is who scales what."""
    return _CHANGES[0]


def is_scaled(parameter: Tensor) -> bool:
    """Tell whether anybody has said to scale ``.grad`` of a parameter."""
    return parameter in _SCALED


def scale_of(parameter: Tensor) -> float:
    """Give what ``.grad`` of a parameter is multiplied by at present, the loss scale apart.

    Example:
        >>> import torch
        >>> scale_of(torch.ones(1))
        1.0
    """
    found = _SCALED.get(parameter)
    if found is None:
        return 1.0
    scaling, index = found
    owner = scaling()
    return 1.0 if owner is None else owner.gradient_scale(index)
