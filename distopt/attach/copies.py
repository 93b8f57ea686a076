"""Copies of a registered DDP model, as ``copy.deepcopy`` and ``torch.save`` make them: plain DDP models.

DDP copies itself without its process group and its reducer, hence without its communication hook. What we have put on
the object stays behind likewise: process groups cannot be copied, and a copy is not what the ranks have agreed on.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

from torch import nn

OVERRIDDEN = ("_pre_forward", "__getstate__")
"""What a registration replaces on the object itself."""


def copy_without(model: nn.Module, owner: object, registration: str) -> None:
    """Let copies of a model have nothing of what ``owner`` does on it.

    Args:
        model: a DDP model; its ``__getstate__``, which ``copy`` and ``pickle`` ask, is replaced on the object.
        owner: whose methods are among its hooks.
        registration: the attribute that holds the registration.
    """
    begin = cast(Callable[[], dict[str, Any]], cast(Any, model).__getstate__)

    def state() -> dict[str, Any]:
        left = begin()
        for name in (*OVERRIDDEN, registration):
            left.pop(name, None)
        hooks = left["_forward_hooks"].items()
        left["_forward_hooks"] = OrderedDict((key, hook) for key, hook in hooks if not _is_of(hook, owner))
        left["_comm_hooks"] = [pair for pair in left["_comm_hooks"] if not _is_of(pair[0], owner)]
        return left

    cast(Any, model).__getstate__ = state


def _is_of(hook: object, owner: object) -> bool:
    return getattr(hook, "__self__", None) is owner
