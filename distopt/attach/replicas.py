"""The tensors that every rank holds a copy of: named, made equal, and averaged in a few big payloads."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from distopt.attach.exemptions import plain_name
from distopt.comm.communicator import Communicator

PAYLOAD_BYTES = 256 * 2**20
"""Most bytes that one collective carries, unless a single tensor has more."""


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name, without the prefix that ``torch.compile`` gives them."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """All buffers by name, without the prefix that ``torch.compile`` gives them."""
    return {plain_name(name): buffer for name, buffer in model.named_buffers()}


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds; the others are caches, which their modules make anew."""
    saved = {plain_name(name) for name in model.state_dict(keep_vars=True)}
    return {name: buffer for name, buffer in named_buffers(model).items() if name in saved}


def as_real(tensor: Tensor) -> Tensor:
    """The same memory as real numbers, with one more dimension if it was complex."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of ``dtype`` are averaged: never narrower than float32 or complex64."""
    return torch.promote_types(dtype, torch.float32)


def average(communicator: Communicator, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average tensors over the ranks.

    Args:
        communicator: the ranks.
        tensors: by name; 1-D, real, float32 or float64, none empty, of the same names and shapes on every rank.
            Emptied on the way, for their memory.

    Returns:
        The averages by name, the same bits on every rank; not finite where a number was not on one of them.
    """
    means: dict[str, Tensor] = {}
    for names in _payloads(tensors, lambda tensor: tensor.element_size()):
        lengths = [len(tensors[name]) for name in names]
        flat = communicator.average_(torch.cat([tensors.pop(name) for name in names]))
        means.update(zip(names, flat.split(lengths), strict=True))
    return means


def copy_from_first(communicator: Communicator, tensors: Mapping[str, Tensor]) -> None:
    """Give every rank the first one's tensors, to the bit.

    Args:
        communicator: the ranks.
        tensors: by name, of whatever dtype; of the same names, shapes and dtypes on every rank.
    """
    real = {name: as_real(tensor.detach()) for name, tensor in tensors.items() if tensor.numel()}
    for names in _payloads(real, lambda tensor: tensor.element_size()):
        flat = torch.cat([real[name].reshape(-1) for name in names])
        communicator.broadcast_(flat)
        for name, piece in zip(names, flat.split([real[name].numel() for name in names]), strict=True):
            real[name].copy_(piece.view(real[name].shape))


def _payloads(tensors: Mapping[str, Tensor], bytes_each: Callable[[Tensor], int]) -> list[list[str]]:
    """Names of the tensors that share a collective: of one device and dtype, in their order."""
    groups: dict[tuple[torch.device, torch.dtype], list[list[str]]] = {}
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    for name, tensor in tensors.items():
        kind, size = (tensor.device, tensor.dtype), tensor.numel() * bytes_each(tensor)
        group = groups.setdefault(kind, [[]])
        if group[-1] and sizes[kind] + size > PAYLOAD_BYTES:
            group.append([])
        sizes[kind] = size + (sizes[kind] if group[-1] else 0)
        group[-1].append(name)
    # Known as a whole before the first is used: whoever averages them takes them away.
    return [names for group in groups.values() for names in group]
