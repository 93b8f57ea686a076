"""What the settings of the optimizer and its companions may be."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from distopt.errors import SettingError

MOMENTS_KINDS = ("float32", "bfloat16", "packed16")


def check_number(field: str, value: object, low: float, high: float = math.inf, *, open_ends: bool = False) -> None:
    """Refuse what is not a finite number from ``low`` to ``high``.

    Args:
        field: the setting's name as the user wrote it.
        value: what was given; a tensor of one element will do.
        low: lower bound.
        high: upper bound, which is not allowed itself.
        open_ends: the lower bound is not allowed either.

    Raises:
        SettingError: it is something else.

    Example:
        >>> check_number("AdamW.lr", 1e-3, 0)
    """
    number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        number = math.nan
    if not low <= number < high or (open_ends and number == low):
        above = "above" if open_ends else "of at least"
        raise SettingError(
            field, value, f"a finite number {above} {low:g}" + (f" and below {high:g}" if high < math.inf else "")
        )


def check_count(field: str, value: object, low: int) -> None:
    """Refuse what is not an integer of at least ``low``.

    Raises:
        SettingError: it is something else.

    Example:
        >>> check_count("IterateAverage.every", 25, 1)
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise SettingError(field, value, f"an integer of at least {low}")


def check_settings(group: Mapping[str, Any]) -> None:
    """Refuse a parameter group with a setting out of its range.

    Raises:
        SettingError: the first such setting.
    """
    for name in ("lr", "eps", "weight_decay"):
        check_number(f"AdamW.{name}", group[name], 0)
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise SettingError("AdamW.betas", betas, "two numbers")
    for index, beta in enumerate(betas):
        check_number(f"AdamW.betas[{index}]", beta, 0, 1)
    if group["moments"] not in MOMENTS_KINDS:
        raise SettingError("AdamW.moments", group["moments"], "one of " + ", ".join(map(repr, MOMENTS_KINDS)))
    if group["max_variance"] is not None:
        check_number("AdamW.max_variance", group["max_variance"], 0, open_ends=True)
