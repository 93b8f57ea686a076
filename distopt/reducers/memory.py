"""Where residuals and factors are kept from step to step, in the format that the user chose."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.numerics.storage import Packed, StorageDtype, Stored, pack, unpack
from distopt.reducers.reducer import Slot, State

_WORKING = {torch.float64: torch.float64, torch.complex64: torch.complex64, torch.complex128: torch.complex128}


def working_dtype(slot: Slot) -> torch.dtype:
    """What a gradient is compressed in: float64 for float64 gradients, else float32."""
    return _WORKING.get(slot.parameter.dtype, torch.float32)


def is_compressible(slot: Slot) -> bool:
    """Whether a gradient may be compressed: real, not exempt, not empty."""
    return not slot.exempt and slot.parameter.is_floating_point() and slot.parameter.numel() > 0


def clone(stored: Stored) -> Stored:
    """Copy what is kept."""
    if isinstance(stored, Tensor):
        return stored.clone()
    exponent = stored.exponent.clone() if isinstance(stored.exponent, Tensor) else stored.exponent
    return stored._replace(codes=stored.codes.clone(), exponent=exponent)


def storage_of(stored: Stored) -> StorageDtype:
    """The format that something is kept in."""
    if isinstance(stored, Tensor):
        return stored.dtype
    return torch.float16 if stored.codes.dtype == torch.float16 else "1-6-9"


def times(stored: Stored, ratio: float) -> Stored:
    """Multiply what is stored, a plain tensor in place; a power of two changes no bit but the exponent.

    Example:
        >>> times(torch.tensor([0.5, -1.0]), 2.0).tolist()
        [1.0, -2.0]
    """
    return pack(unpack(stored).mul_(ratio), storage_of(stored)) if isinstance(stored, Packed) else stored.mul_(ratio)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Residuals in a storage format.

    A residual that is kept in fewer than 32 bits is rounded stochastically: a gradient too small to move the nearest
    code would otherwise be lost at every step, not only delayed.

    Args:
        dtype: of what is kept; ``None`` for the working dtype.
        seed: of the rounding.
    """

    dtype: StorageDtype | None = None
    seed: int = 0

    def add_into(self, slot: Slot, gradient: Tensor, state: State) -> Tensor:
        """Give gradient plus residual, in the working dtype: in the gradient's own memory where that has the dtype."""
        residual = state.residuals.get(slot.name)
        dtype = working_dtype(slot)
        if residual is None:
            return gradient.to(dtype)
        wide = unpack(residual, dtype)
        return gradient.add_(wide) if gradient.dtype == dtype else wide + gradient

    def input_again(self, slot: Slot, gradient: Tensor, state: State) -> Tensor:
        """The same sum again, as a copy that its owner may overwrite: the room for the new residual.

        Where the residual is kept in the working dtype, that room is its own.
        """
        residual = state.residuals.get(slot.name)
        dtype = working_dtype(slot)
        room = residual if isinstance(residual, Tensor) and residual.dtype == dtype else None
        if gradient.dtype == dtype:
            if room is None:
                room = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
            return room.copy_(gradient)
        if room is not None:
            return room.add_(gradient)
        if residual is None:
            return torch.empty(gradient.shape, dtype=dtype, device=gradient.device).copy_(gradient)
        return unpack(residual, dtype) + gradient

    def room(self, slot: Slot, gradient: Tensor, state: State) -> Tensor:
        """Where the new residual may be written: over the old one, if that is kept in the working dtype.

        What is kept in another format needs its room only until it is stored: where the gradient's own memory holds
        the input, it is that.
        """
        residual = state.residuals.get(slot.name)
        dtype = working_dtype(slot)
        if isinstance(residual, Tensor) and residual.dtype == dtype and residual.is_contiguous():
            return residual
        if self.dtype not in (None, dtype) and gradient.dtype == dtype and gradient.is_contiguous():
            return gradient
        return torch.empty(gradient.shape, dtype=dtype, device=gradient.device)

    def keep(self, slot: Slot, residual: Tensor, state: State) -> None:
        """Remember what was not sent."""
        state.residuals[slot.name] = pack(residual, self.dtype, self.seed, slot.name, state.step)


def flush(slots: Sequence[Slot], gradients: Sequence[Tensor], state: State) -> list[str]:
    """Add what an earlier reducer left behind to gradients that are sent whole from now on.

    The sum is rounded to the gradient's dtype, as everything is that an exact average sends.

    Returns:
        The names of those that got something, for `forget`. A gradient that this rank has none of, where parameters
        may go without, waits on.
    """
    flushed: list[str] = []
    for slot, gradient in zip(slots, gradients, strict=True):
        residual = state.residuals.get(slot.name)
        if residual is not None and (not slot.optional or bool(gradient.any())):
            gradient.add_(unpack(residual, working_dtype(slot)))
            flushed.append(slot.name)
    return flushed


def forget(names: Sequence[str], state: State) -> None:
    """Let go of residuals that have been sent whole."""
    for name in names:
        del state.residuals[name]
