"""Finding the residual branches of a model, and naming them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from distopt.attach.exemptions import plain_name
from distopt.attach.selection import Blocks, select, unwrapped
from distopt.errors import SettingError


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
        return {name: getattr(module, key) for name, (module, key) in self.owners().items()}

    def owners(self) -> dict[str, tuple[nn.Module, str]]:
        """By the same names, the module that has each parameter, and what it is called there.

        A sharded module has another object there while it computes.
        """
        owners: dict[int, tuple[str, nn.Module, str]] = {}
        for i, module in enumerate(self.modules):
            prefix = f"{self.name}." if len(self.modules) == 1 else f"{self.name}[{i}]."
            for path, inner in module.named_modules():
                for key, parameter in inner.named_parameters(recurse=False):
                    name = f"{prefix}{path}.{key}" if path else f"{prefix}{key}"
                    owners.setdefault(id(parameter), (name, inner, key))
        return {name: (module, key) for name, module, key in owners.values()}


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
    branches = [Branch(*part) for part in select("blocks", blocks, model)]
    _check_parameters(branches, unwrapped(model))
    return branches


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
