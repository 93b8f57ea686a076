"""The parts of a model that are gathered, computed and dropped one at a time."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from distopt.attach.exemptions import plain_name
from distopt.attach.overriding import override_forward
from distopt.attach.replicas import named_parameters
from distopt.attach.selection import Blocks, Part, select
from distopt.errors import RegistrationError, SettingError


def find_units(units: Blocks, model: nn.Module) -> list[Part]:
    """Make a list of the units that were asked for.

    Args:
        units: see `distopt.attach.selection.Blocks`.
        model: that they are parts of.

    Raises:
        RegistrationError: if a parameter has no dimension.
        SettingError: if something is no module of the model, lies inside another unit, or has a parameter in common
            with what is outside of it.

    Example:
        >>> model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential()])})
        >>> [unit.name for unit in find_units("blocks.*", model)]
        ['blocks.0', 'blocks.1']
    """
    refuse_numbers(model)
    parts = select("units", units, model)
    names = {id(module): plain_name(name) for name, module in model.named_modules()}
    for part in parts:
        for module in part.modules:
            if module is model or id(module) not in names:
                raise SettingError("units", part.name, f"inside of the model, which is a {type(model).__name__}")
            if type(module).forward is nn.Module.forward:
                raise SettingError("units", part.name, f"what is called in forward, unlike a {type(module).__name__}")
    owners = {id(inner): part for part in parts for m in part.modules for inner in m.modules() if inner is not m}
    nested = next((part for part in parts if any(id(module) in owners for module in part.modules)), None)
    if nested is not None:
        outer = owners[next(id(module) for module in nested.modules if id(module) in owners)]
        raise SettingError("units", nested.name, f"outside of the others: it is a part of {outer.name}")
    _check_ties(parts, model)
    return parts


def refuse_numbers(model: nn.Module) -> None:
    """Raise a `RegistrationError` if a parameter has no dimension: torch's ``fully_shard`` takes none."""
    for name, parameter in named_parameters(model).items():
        if parameter.dim() == 0:
            raise RegistrationError(f"{name!r} has no dimension to cut it along: make its shape (1,)")


def names_by_unit(parts: Sequence[Part], model: nn.Module) -> list[list[str]]:
    """Names of the parameters that are gathered together: those of each unit, and in the end all others.

    Args:
        parts: the units, as `find_units` gives them.
        model: that they are parts of.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        >>> names_by_unit(find_units([model[0]], model), model)
        [['0.weight', '0.bias'], ['1.weight']]
    """
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    inside = [{id(p): None for module in part.modules for p in module.parameters()} for part in parts]
    return [*([names.pop(i) for i in unit] for unit in inside), list(names.values())]


def recompute_in_backward(module: nn.Module) -> Callable[[], None]:
    """Keep a module's inputs only, and compute what its backward needs a second time.

    It happens on the object: no class and no name changes.

    Returns:
        A function that undoes it.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> undo = recompute_in_backward(module)
        >>> module(torch.ones(1, 2)).sum().backward(), [name for name, _ in module.named_parameters()]
        (None, ['weight', 'bias'])

    Source: Chen et al. 2016 (arXiv:1604.06174).
    """

    def around(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        return checkpoint(inner, *args, use_reentrant=False, **kwargs)

    return override_forward(module, around)


def prefetch(root: FSDPModule, units: Sequence[FSDPModule]) -> None:
    """Gather each unit while the one before it, in forward and in backward, computes.

    Args:
        root: the model; it is the first in both.
        units: in the order of forward.
    """
    for before, after in itertools.pairwise([root, *units]):
        before.set_modules_to_forward_prefetch([after])
    for before, after in itertools.pairwise([root, *reversed(units)]):
        before.set_modules_to_backward_prefetch([after])


def _check_ties(parts: Sequence[Part], model: nn.Module) -> None:
    """A parameter is gathered with one unit; elsewhere it would not be there."""
    owner = {id(inner): part.name for part in parts for module in part.modules for inner in module.modules()}
    first: dict[int, tuple[str, str | None]] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(path, recurse=False):
            name, unit = first.setdefault(id(parameter), (plain_name(key), owner.get(id(module))))
            if unit != owner.get(id(module)):
                where = "outside of all units" if unit is None else f"in {unit}"
                raise SettingError(
                    "units", plain_name(key), f"in the same unit as {name}, which it is tied to and which is {where}"
                )
