"""Gradients of trainers that use no wrapper: a plain list of parameters, reduced when ``backward`` is over."""

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distopt.attach.engine import Engine
from distopt.attach.exemptions import is_exempt_by_name, plain_name
from distopt.attach.transaction import spoil
from distopt.errors import RegistrationError
from distopt.reducers.reducer import Slot

BUCKET_BYTES = 25 * 2**20
"""How many bytes of gradients are reduced together, as in DDP."""


class GradientsAttachment:
    """Reduces ``.grad`` of parameters, in their order, when told to.

    Args:
        engine: carries out the steps.
    """

    fused = False

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._layout: list[list[str]] = []

    def settle(self) -> None:
        """See `Attachment.settle`."""

    def layout(self) -> list[list[str]]:
        """See `Attachment.layout`."""
        return self._layout

    def keep_layout(self, layout: Sequence[Sequence[str]]) -> None:
        """See `Attachment.keep_layout`: ours never changes but with the gradients that there are."""
        self._layout = [list(names) for names in layout]

    def gradients(self) -> dict[str, Tensor]:
        """See `Attachment.gradients`."""
        return gradients_of(self._engine.slots.values())

    def reduce(self) -> bool:
        """See `Registration.reduce`."""
        self._engine.begin(tuple(self._engine.slots))
        slots = self._present()
        buckets = _buckets(slots)
        self._layout = [[slot.name for slot in bucket] for bucket in buckets]
        for bucket in buckets:
            gradients = [_gradient(slot) for slot in bucket]
            segments = [segment_of(gradient) for gradient in gradients]
            self._engine.propose(tuple(slot.name for slot in bucket), gradients, segments, None)
        taken = self._engine.finish()
        if not taken:
            self._drop(slots)
        return taken

    def _drop(self, slots: Sequence[Slot]) -> None:
        spoil(_gradient(slot) for slot in slots)

    def _present(self) -> list[Slot]:
        """The parameters that have a gradient on any rank; where this one has none, it gets one of zeros."""
        slots = list(self._engine.slots.values())
        sparse = next(
            (slot.name for slot in slots if slot.parameter.grad is not None and slot.parameter.grad.is_sparse), None
        )
        if sparse is not None:
            raise RegistrationError(f"the gradient of {sparse!r} is sparse, which cannot be reduced")
        here = [float(slot.parameter.grad is not None) for slot in slots]
        anywhere = self._engine.communicator.average_(torch.tensor(here, device=slots[0].parameter.device))
        present = [slot for slot, share in zip(slots, anywhere.tolist(), strict=True) if share > 0]
        for slot in present:
            if slot.parameter.grad is None:
                slot.parameter.grad = torch.zeros_like(slot.parameter)
            elif not _lies_like(slot.parameter.grad, slot.parameter):
                slot.parameter.grad = torch.empty_like(slot.parameter).copy_(slot.parameter.grad)
        return present


def slots_of(parameters: Iterable[object]) -> list[Slot]:
    """Name the parameters of a plain list; those without a name are called by their place.

    Args:
        parameters: ``model.named_parameters()``, or a list of parameters.

    Raises:
        RegistrationError: if there is anything else in it, nothing at all, or a name or a parameter twice; if a
            parameter is computed from others, or has no shape yet.
    """
    if isinstance(parameters, Tensor):
        raise RegistrationError("register needs a list of parameters, but was given one tensor: put it into a list")
    slots: list[Slot] = []
    for index, item in enumerate(parameters):
        name, parameter = cast(tuple[Any, Any], item) if isinstance(item, tuple) else (str(index), item)
        if not isinstance(name, str) or not isinstance(parameter, Tensor):
            raise RegistrationError(
                f"item {index} is a {type(item).__name__}, but must be a parameter or (name, parameter)"
            )
        name = plain_name(name)
        if not parameter.is_leaf:
            raise RegistrationError(f"{name!r} is computed from others: it has no gradient of its own to reduce")
        if is_lazy(parameter):
            raise RegistrationError(f"{name!r} has no shape yet: let the model compute something first")
        exempt = is_exempt_by_name(name) or sum(side > 1 for side in parameter.shape) < 2
        slots.append(Slot(name, cast(nn.Parameter, parameter), exempt=exempt))
    if not slots:
        raise RegistrationError("there is no parameter to register")
    keys: list[Callable[[Slot], object]] = [lambda slot: slot.name, lambda slot: id(slot.parameter)]
    for key in keys:
        counts = collections.Counter(map(key, slots))
        twice = next((slot.name for slot in slots if counts[key(slot)] > 1), None)
        if twice is not None:
            raise RegistrationError(f"{twice!r} is there twice")
    return slots


def gradients_of(slots: Iterable[Slot]) -> dict[str, Tensor]:
    """The gradients that parameters have, by name."""
    return {slot.name: slot.parameter.grad for slot in slots if slot.parameter.grad is not None}


def _buckets(slots: Sequence[Slot]) -> list[list[Slot]]:
    """Consecutive parameters of one dtype and device, up to a size; the same on all ranks."""
    buckets: list[list[Slot]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], tuple[list[Slot], int]] = {}
    for slot in slots:
        kind = slot.parameter.dtype, slot.parameter.device
        size = slot.parameter.numel() * slot.parameter.element_size()
        bucket, filled = open_buckets.get(kind, ([], BUCKET_BYTES))
        if filled + size > BUCKET_BYTES:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(slot)
        open_buckets[kind] = bucket, filled + size
    return buckets


def _gradient(slot: Slot) -> Tensor:
    assert slot.parameter.grad is not None
    return slot.parameter.grad


def segment_of(gradient: Tensor) -> Tensor:
    """The memory of a dense tensor as one dimension, complex numbers as pairs of real ones."""
    flat = gradient.as_strided((gradient.numel(),), (1,), gradient.storage_offset())
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


def _lies_like(gradient: Tensor, parameter: Tensor) -> bool:
    """Whether the gradient's elements lie in memory as `torch.empty_like` would lay them out, on every rank alike."""
    return gradient.stride() == torch.empty_like(parameter, device="meta").stride()
