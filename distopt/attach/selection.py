"""Finding parts of a model in the ways that a user may name them."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.attach.exemptions import plain_name
from distopt.attach.fairscale import SHARDED_DDP, kind_of
from distopt.errors import SettingError

Chain: TypeAlias = nn.Module | Sequence[nn.Module]
"""A part: a module, or the modules that it consists of, first to last."""

Blocks: TypeAlias = Mapping[str, Chain] | Iterable[Any] | str | Callable[[nn.Module], Any]
"""Parts by name or in a row, patterns of their modules' names, or what finds them in a model. Where a pattern matches a
module and others inside it, the outermost is the part."""

ALLOWED = "modules, tuples of modules, a mapping of names to them, or with model= a name pattern or a callable"


class Part(NamedTuple):
    """A part of a model."""

    name: str
    modules: tuple[nn.Module, ...]


def select(field: str, blocks: Blocks, model: nn.Module | None = None) -> list[Part]:
    """Make a list of the parts that were asked for.

    Args:
        field: what the setting is called, for messages.
        blocks: see `Blocks`. Names of modules are those of ``model.named_modules()``, without wrappers'.
        model: where patterns and callables look, and where names come from.

    Returns:
        At least one part, each with a name of its own; without names, they are called by their place.

    Raises:
        SettingError: if something is no module, or nothing is found.

    Example:
        >>> model = nn.ModuleDict({"a": nn.ModuleDict({"mlp": nn.Linear(2, 2)})})
        >>> [part.name for part in select("units", "*.mlp", model)]
        ['a.mlp']
    """
    model = unwrapped(model)
    names = {} if model is None else {id(module): plain_name(name) for name, module in model.named_modules()}
    parts = [_part(field, item, place, names) for place, item in enumerate(_items(field, blocks, model))]
    if not parts:
        raise SettingError(field, blocks, f"something that is not empty: {ALLOWED}")
    known = [part.name for part in parts]
    twice = next((name for name in known if known.count(name) > 1), None)
    if twice is not None:
        raise SettingError(field, twice, "named once: two of them have this name")
    return parts


def unwrapped(model: nn.Module | None) -> nn.Module | None:
    """The model itself, out of DDP, fairscale's or torch's, and of what ``torch.compile`` made of it."""
    model = getattr(model, "_orig_mod", model)
    wrapped = isinstance(model, DistributedDataParallel) or kind_of(model) == SHARDED_DDP
    return cast(Any, model).module if wrapped else model


def _items(field: str, blocks: Any, model: nn.Module | None) -> list[Any]:
    if isinstance(blocks, str):
        return _matching(field, [blocks], model)
    if isinstance(blocks, (nn.ModuleList, nn.ModuleDict, Mapping)):
        return list(cast(Any, blocks).items()) if not isinstance(blocks, nn.ModuleList) else list(blocks)
    if isinstance(blocks, nn.Module):
        raise SettingError(field, type(blocks).__name__, f"its parts: {ALLOWED}")
    if callable(blocks):
        if model is None:
            raise SettingError(field, blocks, "given together with model=, which it looks through")
        return _items(field, blocks(model), model)
    if not isinstance(blocks, Iterable):
        raise SettingError(field, blocks, ALLOWED)
    items = list(cast(Iterable[Any], blocks))
    return _matching(field, items, model) if items and all(isinstance(item, str) for item in items) else items


def _matching(field: str, patterns: Sequence[str], model: nn.Module | None) -> list[Any]:
    if model is None:
        raise SettingError(field, ", ".join(patterns), "given together with model=, whose modules it names")
    named = [(plain_name(name), module) for name, module in model.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in named):
            raise SettingError(field, pattern, "a pattern that matches the name of a module, as in '*.mlp'")
    found: list[tuple[str, nn.Module]] = []
    for name, module in named:  # an outer module comes before those in it, which are part of it
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if not inside and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            found.append((name, module))
    return found


def _part(field: str, item: Any, place: int, names: Mapping[int, str]) -> Part:
    name = None
    if isinstance(item, tuple) and len(cast(tuple[Any, ...], item)) == 2 and isinstance(item[0], str):
        name, item = cast(tuple[str, Any], item)
    modules = [item] if isinstance(item, nn.Module) else list(cast(Iterable[Any], item)) if _is_row(item) else []
    if not modules or not all(isinstance(module, nn.Module) for module in modules):
        raise SettingError(f"{field}[{place if name is None else repr(name)}]", item, ALLOWED)
    found = [names[id(module)] for module in modules if id(module) in names]
    return Part(name or (found[-1] if found else str(place)), tuple(modules))


def _is_row(item: Any) -> bool:
    return isinstance(item, (tuple, list, nn.ModuleList))
