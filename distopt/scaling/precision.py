"""What stays in float32: DALL-E's second guideline for 16-bit training.

Source: Ramesh et al. 2021 (arXiv:2102.12092), appendix D: use 16 bits only where it pays. Gains, biases, embeddings
and unembeddings stay float32, with float32 gradients and moments, and so do the logits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distopt.attach.exemptions import exempt_names, plain_name
from distopt.attach.overriding import override_forward
from distopt.attach.selection import Blocks
from distopt.errors import SettingError
from distopt.scaling.branches import find_branches


def to_16bit(
    blocks: Blocks, dtype: torch.dtype = torch.float16, *, model: nn.Module | None = None, keep: Sequence[str] = ()
) -> list[str]:
    """Turn the matrices of residual branches into 16-bit parameters, in place; all else stays as it is.

    Gains, biases, norms, embeddings and unembeddings stay float32. Do it before the optimizer is made. The branches
    must run under autocast, as they do under `ResblockScaler`, and the optimizer must compute in float32, as
    `distopt.optim.AdamW` does: 16-bit parameters lose updates smaller than half their spacing.

    Args:
        blocks: the branches, as `ResblockScaler` takes them.
        dtype: ``torch.float16`` or ``torch.bfloat16``.
        model: where patterns and callables look.
        keep: names of modules' parameters that stay float32 besides, as in ``module.named_parameters()``.

    Returns:
        Names of the parameters that were converted, each with its branch.

    Raises:
        SettingError: if a setting is not allowed or nothing is found.

    Example:
        >>> mlp = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
        >>> to_16bit({"mlp": mlp}), mlp[1].weight.dtype, mlp[1].bias.dtype
        (['mlp.1.weight'], torch.float16, torch.float32)
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise SettingError("dtype", dtype, "torch.float16 or torch.bfloat16")
    converted: list[str] = []
    for branch in find_branches(blocks, model):
        exempt = {id(p) for module in branch.modules for p in _exempt(module, keep)}
        for name, parameter in branch.parameters().items():
            if id(parameter) not in exempt and parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(dtype)
                converted.append(name)
    return converted


def in_float32(module: nn.Module) -> Callable[[], None]:
    """Let a module compute in float32 from now on, whatever autocast says: for unembeddings and what follows them.

    Args:
        module: its parameters must be float32. What it is given in 16 bits is widened.

    Returns:
        A function that undoes it.

    Raises:
        SettingError: if a parameter has fewer bits.

    Example:
        >>> head = nn.Linear(4, 9)
        >>> undo = in_float32(head)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     head(torch.ones(1, 4)).dtype
        torch.float32
    """
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and torch.finfo(parameter.dtype).bits < 32:
            raise SettingError(plain_name(name), parameter.dtype, "float32 in a module that computes in float32")

    def widen(x: Any) -> Any:
        return x.to(torch.promote_types(x.dtype, torch.float32)) if _is_floating(x) else x

    def around(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = pytree.tree_map(widen, (args, kwargs))
        device = next((x.device.type for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return inner(*args, **kwargs)

    return override_forward(module, around)


def _exempt(module: nn.Module, keep: Sequence[str]) -> list[nn.Parameter]:
    names = exempt_names(module) | set(keep)
    return [parameter for name, parameter in module.named_parameters() if name in names]


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
