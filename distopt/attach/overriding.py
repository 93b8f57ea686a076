"""Doing something around a module's ``forward``, on the object itself, with no change of its class or its names."""

import types
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

Around: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""What is to be done: it is given what calls the module's own ``forward``, and what the module was called with."""


def override_forward(module: nn.Module, around: Around) -> Callable[[], None]:
    """Let a module's ``forward`` go through ``around``.

    A deep copy of the module gets its own ``forward``, which goes through the same ``around``.

    Args:
        module: any, its ``forward`` overridden already or not.
        around: returns what ``forward`` is to return.

    Returns:
        A function that undoes it.

    Example:
        >>> import torch
        >>> undo = override_forward(nn.Identity(), lambda inner, args, kwargs: 2 * inner(*args, **kwargs))
    """
    before = module.__dict__.get("forward")
    own = _unbound(module, before)

    def forward(of: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            return own(of, *args, **kwargs)

        return around(inner, args, kwargs)

    module.forward = types.MethodType(forward, module)

    def undo() -> None:
        del module.forward
        if before is not None:
            module.forward = before

    return undo


def _unbound(module: nn.Module, before: Any) -> Callable[..., Any]:
    """The module's present ``forward`` as a function of the module."""
    if before is None:
        return type(module).forward
    if isinstance(before, types.MethodType):
        return before.__func__

    def own(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs)

    return own
