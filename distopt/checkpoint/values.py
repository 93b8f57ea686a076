"""What may be saved: things with a state, and states of tensors and plain values only."""

from collections import Counter, OrderedDict
from collections.abc import Callable, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from distopt.errors import CheckpointError, SettingError

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_LISTS = (list, tuple, set)
_MAPPINGS = (dict, OrderedDict, Counter)
_TENSORS = (Tensor, nn.Parameter)
_DEEPEST = 100


class Value:
    """A plain value to save: a number, a text, a list of such things, a tensor.

    Args:
        value: what to save; after `load` it is what was saved.

    Example:
        >>> position = Value(3)
        >>> position.load_state_dict({"value": 7})
        >>> position.value
        7
    """

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        """Give the value."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved value."""
        self.value = state["value"]


class PerRank:
    """Something that differs from rank to rank: every rank saves its own state, and as many ranks must load it.

    Args:
        thing: whatever `save` takes: something with ``state_dict`` and ``load_state_dict``, or a dictionary.

    Example:
        >>> PerRank(Value(3)).thing.value
        3
    """

    def __init__(self, thing: Any) -> None:
        self.thing = thing


def check_thing(name: str, thing: Any) -> None:
    """See whether something has a state.

    Args:
        name: that it is saved under.
        thing: what was given.

    Raises:
        SettingError: the name cannot be that of a file, or the thing has no state.

    Example:
        >>> check_thing("step_size", 0.5)
        Traceback (most recent call last):
        distopt.errors.SettingError: checkpoint's step_size is 'float', but must be something with state_dict() \
and load_state_dict(), a dictionary, a torch.Generator, or a Value or PerRank of distopt.checkpoint
    """
    if not (name.isidentifier() and name.isascii()):
        raise SettingError("checkpoint's name", name, "an identifier")
    thing = thing.thing if isinstance(thing, PerRank) else thing
    having = hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
    if not having and not isinstance(thing, (MutableMapping, torch.Generator)):
        allowed = (
            "something with state_dict() and load_state_dict(), a dictionary, a torch.Generator, or a Value or PerRank "
            "of distopt.checkpoint"
        )
        raise SettingError(f"checkpoint's {name}", type(thing).__name__, allowed)


def state_of(thing: Any) -> Any:
    """The state of a thing; of DDP and compiled models that of the user's own module."""
    if isinstance(thing, torch.Generator):
        return {"generator": thing.get_state()}
    thing = own_module(thing)
    return thing.state_dict() if hasattr(thing, "state_dict") else dict(thing)


def put(thing: Any, state: Any) -> None:
    """Give a thing a state that was read back."""
    thing = own_module(thing)
    if isinstance(thing, torch.Generator):
        thing.set_state(state["generator"])
    elif hasattr(thing, "load_state_dict"):
        thing.load_state_dict(state)
    else:
        thing.clear()
        thing.update(state)


def own_module(thing: Any) -> Any:
    """The user's own module, out of DDP and ``torch.compile``; anything else as it is."""
    while isinstance(thing, nn.Module):
        if isinstance(thing, nn.parallel.DistributedDataParallel):
            thing = thing.module
        elif isinstance(inner := getattr(thing, "_orig_mod", None), nn.Module):
            thing = inner
        else:
            break
    return thing


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, of which this rank has a part; importing that would take a second."""
    return isinstance(tensor, Tensor) and any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__)


def check_state(name: str, state: Any, depth: int = 0) -> None:
    """See whether a state can be read back without executing anything.

    Args:
        name: what it is called in messages.
        state: of a thing.
        depth: how deep inside of a state it is.

    Raises:
        CheckpointError: it holds something else than tensors and plain values; the message says where, and what.

    Example:
        >>> check_state("options", {"lr": 0.1, "loss": print})
        Traceback (most recent call last):
        distopt.errors.CheckpointError: options['loss'] is a builtins.builtin_function_or_method: a checkpoint holds \
tensors and plain values only
    """
    kind = type(state)
    if depth > _DEEPEST:
        raise CheckpointError(f"{name[:100]}... is nested too deeply for a checkpoint, or holds itself")
    if kind in _MAPPINGS:
        for key, value in state.items():
            if type(key) is not str:
                check_state(f"a key of {name}", key, depth + 1)
            check_state(f"{name}[{key!r}]", value, depth + 1)
    elif kind in _LISTS:
        for index, value in enumerate(state):
            check_state(f"{name}[{index}]", value, depth + 1)
    elif kind in _TENSORS or is_sharded(state):
        if state.is_meta or state.is_quantized or state.layout != torch.strided or state.is_nested:
            raise CheckpointError(
                f"{name} is a tensor without values, quantised, sparse or nested: not for a checkpoint"
            )
    elif kind not in _ATOMS:
        full = f"{kind.__module__}.{kind.__qualname__}"
        raise CheckpointError(f"{name} is a {full}: a checkpoint holds tensors and plain values only")


def mapped(state: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of a state with every tensor changed, in a fixed order; attributes of mappings stay.

    Example:
        >>> mapped({"a": [torch.tensor(1), 2]}, lambda tensor: tensor.item() + 1)
        {'a': [2, 2]}
    """
    if isinstance(state, Tensor):
        return change(state)
    kind = type(state)
    if kind in _MAPPINGS:
        copy = kind((key, mapped(value, change)) for key, value in state.items()) if kind is not Counter else state
        if hasattr(state, "_metadata"):  # versions of modules, which older states are converted by
            cast(Any, copy)._metadata = state._metadata
        return copy
    if kind in (list, tuple):
        return kind(mapped(value, change) for value in state)
    return state


def to_cpu(tensor: Tensor) -> Tensor:
    """A tensor's values on the CPU, without the rest of a larger memory that it is a part of."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    own = tensor.numel() * tensor.element_size()
    return tensor.clone() if tensor.untyped_storage().nbytes() > own else tensor
