"""Finding the residual branches of a model, and naming them."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.attach.exemptions import plain_name
from distopt.errors import SettingError

Chain: TypeAlias = nn.Module | Sequence[nn.Module]
"""A branch: a module, or the modules that it consists of, first to last."""

Blocks: TypeAlias = Mapping[str, Chain] | Iterable[Any] | str | Callable[[nn.Module], Any]
"""Branches by name or in a row, patterns of their modules' names, or what finds them in a model. Where a pattern
matches a module and others inside it, the outermost is the branch."""

_ALLOWED = "modules, tuples of modules, a mapping of names to them, or with model= a name pattern or a callable"


@dataclass(frozen=True)
class Branch:
    """A residual branch: ``f`` of ``x + f(x)``.

    Args:
        name: what its scale is called.
        modules: it begins where the first is entered and ends where the last is left.
    """

    name: str
    modules: tuple[nn.Module, ...]

    def parameters(self) -> dict[str, nn.Parameter]:
        """All its parameters, by a name for messages."""
        named: dict[str, nn.Parameter] = {}
        for i, module in enumerate(self.modules):
            prefix = f"{self.name}." if len(self.modules) == 1 else f"{self.name}[{i}]."
            named.update((prefix + name, parameter) for name, parameter in module.named_parameters())
        return named


def find_branches(blocks: Blocks, model: nn.Module | None = None) -> list[Branch]:
    """Make a list of the branches that were asked for.

    Args:
        blocks: see `Blocks`. Names of modules are those of ``model.named_modules()``, without wrappers'.
        model: where patterns and callables look, and where names come from.

    Returns:
        At least one branch, each with a name of its own; without names, they are called by their place.

    Raises:
        SettingError: if something is no module, nothing is found, or a parameter is in two branches, or in one
            branch and somewhere else in ``model``.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> [branch.name for branch in find_branches("*.mlp", nn.ModuleDict({"a": nn.ModuleDict({"mlp": mlp})}))]
        ['a.mlp']
    """
    model = _unwrapped(model)
    names = {} if model is None else {id(module): plain_name(name) for name, module in model.named_modules()}
    branches = [_branch(item, place, names) for place, item in enumerate(_items(blocks, model))]
    if not branches:
        raise SettingError("blocks", blocks, f"something that is not empty: {_ALLOWED}")
    known = [branch.name for branch in branches]
    twice = next((name for name in known if known.count(name) > 1), None)
    if twice is not None:
        raise SettingError("blocks", twice, "named once: two branches have this name")
    _check_parameters(branches, model)
    return branches


def _unwrapped(model: nn.Module | None) -> nn.Module | None:
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def _items(blocks: Any, model: nn.Module | None) -> list[Any]:
    if isinstance(blocks, str):
        return _matching([blocks], model)
    if isinstance(blocks, (nn.ModuleList, nn.ModuleDict, Mapping)):
        return list(cast(Any, blocks).items()) if not isinstance(blocks, nn.ModuleList) else list(blocks)
    if isinstance(blocks, nn.Module):
        raise SettingError("blocks", type(blocks).__name__, f"its residual branches: {_ALLOWED}")
    if callable(blocks):
        if model is None:
            raise SettingError("blocks", blocks, "given together with model=, which it looks through")
        return _items(blocks(model), model)
    if not isinstance(blocks, Iterable):
        raise SettingError("blocks", blocks, _ALLOWED)
    items = list(cast(Iterable[Any], blocks))
    return _matching(items, model) if items and all(isinstance(item, str) for item in items) else items


def _matching(patterns: Sequence[str], model: nn.Module | None) -> list[Any]:
    if model is None:
        raise SettingError("blocks", ", ".join(patterns), "given together with model=, whose modules it names")
    named = [(plain_name(name), module) for name, module in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in named):
            raise SettingError("blocks", pattern, "a pattern that matches the name of a module, as in '*.mlp'")
    found: list[tuple[str, nn.Module]] = []
    for name, module in named:  # an outer module comes before those in it, which are part of it
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if not inside and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            found.append((name, module))
    return found


def _branch(item: Any, place: int, names: Mapping[int, str]) -> Branch:
    name = None
    if isinstance(item, tuple) and len(cast(tuple[Any, ...], item)) == 2 and isinstance(item[0], str):
        name, item = cast(tuple[str, Any], item)
    modules = [item] if isinstance(item, nn.Module) else list(cast(Iterable[Any], item)) if _is_row(item) else []
    if not modules or not all(isinstance(module, nn.Module) for module in modules):
        raise SettingError(f"blocks[{place if name is None else repr(name)}]", item, _ALLOWED)
    found = [names[id(module)] for module in modules if id(module) in names]
    return Branch(name or (found[-1] if found else str(place)), tuple(modules))


def _is_row(item: Any) -> bool:
    return isinstance(item, (tuple, list, nn.ModuleList))


def _check_parameters(branches: Sequence[Branch], model: nn.Module | None) -> None:
    """A parameter in two places gets gradients of two scales, and no factor takes both away."""
    owner: dict[int, str] = {}
    inside: set[int] = set()
    for branch in branches:
        for name, parameter in branch.parameters().items():
            if owner.setdefault(id(parameter), branch.name) != branch.name:
                raise SettingError("blocks", name, f"in one branch only: {owner[id(parameter)]} has it too")
        inside.update(id(module) for part in branch.modules for module in part.modules())
    devices = {parameter.device for branch in branches for parameter in branch.parameters().values()}
    if len(devices) > 1:
        raise SettingError("blocks", ", ".join(sorted(map(str, devices))), "on one device")
    for path, module in model.named_modules() if model is not None else ():
        for name, parameter in module.named_parameters(recurse=False) if id(module) not in inside else ():
            if id(parameter) in owner:
                where = plain_name(f"{path}.{name}" if path else name)
                raise SettingError("blocks", owner[id(parameter)], f"without the parameter that is also {where}")
