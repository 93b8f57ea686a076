"""Doing something around a module's ``forward``, on the object itself, with no change of its class or its names."""

import functools
import types
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from distopt.attach.fairscale import checkpoint_of

Around: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""What is to be done: it is given what calls the module's own ``forward``, and what the module was called with."""


def override_forward(module: nn.Module, around: Around) -> Callable[[], None]:
    """Let a module's ``forward`` go through ``around``.

    Where fairscale's ``checkpoint_wrapper`` is on the module, ``around`` is done inside of it, and again whenever it
    recomputes, for it does not repeat the autocast that it was called under. A deep copy of any other module gets its
    own ``forward``, which goes through the same ``around``.

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
    recomputing = checkpoint_of(before)
    own = _unbound(module, before) if recomputing is None else recomputing.args[0]

    def forward(of: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            return own(of, *args, **kwargs)

        return around(inner, args, kwargs)

    if recomputing is None:
        module.forward = types.MethodType(forward, module)
    else:
        module.forward = functools.partial(recomputing.func, forward, *recomputing.args[1:])

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
