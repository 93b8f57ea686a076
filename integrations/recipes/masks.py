"""Bags of different sizes in one tensor: filled up, with a mask that tells what is an instance."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distopt.errors import SettingError


def pad_bags(bags: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Lay bags of different sizes beside each other.

    Args:
        bags: each ``(n, ...)``, n at least 1.

    Returns:
        ``(B, N, ...)``, filled up with zeros, and the mask ``(B, N)``.

    Raises:
        SettingError: there is no bag, or one is empty.

    Example:
        >>> instances, mask = pad_bags([torch.ones(2, 3), torch.ones(1, 3)])
        >>> instances.shape, mask.tolist()
        (torch.Size([2, 2, 3]), [[True, True], [True, False]])
    """
    sizes = [len(bag) for bag in bags]
    if not sizes or min(sizes) == 0:
        raise SettingError("bags", sizes, "at least one bag, with at least one instance each")
    mask = torch.arange(max(sizes), device=bags[0].device) < torch.tensor(sizes, device=bags[0].device)[:, None]
    return nn.utils.rnn.pad_sequence(list(bags), batch_first=True), mask


def checked_mask(instances: Tensor, mask: Tensor | None) -> Tensor:
    """The mask ``(B, N)`` of ``(B, N, C)``, all of it where none is given.

    Raises:
        SettingError: shapes do not fit, or a bag has no instance.
    """
    if instances.dim() != 3 or instances.shape[1] == 0:
        raise SettingError("the shape of instances", tuple(instances.shape), "(bags, instances, classes or features)")
    if mask is None:
        return torch.ones(instances.shape[:2], dtype=torch.bool, device=instances.device)
    if mask.dtype != torch.bool or mask.shape != instances.shape[:2]:
        raise SettingError("mask", (mask.dtype, tuple(mask.shape)), f"of bools, {tuple(instances.shape[:2])}")
    if not bool(mask.any(1).all()):
        empty = (~mask.any(1)).nonzero().flatten().tolist()
        raise SettingError("mask", f"without an instance in bags {empty}", "true for at least one instance a bag")
    return mask


def check_count(name: str, value: object) -> None:
    """Refuse, by its name, what is no integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingError(name, value, "an integer of at least 1")
