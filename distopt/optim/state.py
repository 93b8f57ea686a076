"""What AdamW keeps for a parameter: its step and two moments, under the names that torch gives them."""

from typing import Any, cast

import torch
from torch import Tensor

from distopt.optim.moments import FORMATS, Stored
from distopt.optim.update import widest

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Mean and variance, by the names that torch gives them."""

_SETTING = {torch.int16: "packed16", torch.bfloat16: "bfloat16"}


def new_state(parameter: Tensor, moments: str, *, counted: bool = False) -> dict[str, Any]:
    """Make the state before the first step.

    Args:
        parameter: what it is for.
        moments: how they are kept, ``"packed16"`` for example.
        counted: whether steps are counted on the parameter's device.

    Returns:
        ``step`` (a float32 scalar, on the CPU unless ``counted``, as torch keeps it), ``exp_avg``, ``exp_avg_sq``, and
        the scales of formats that have them.
    """
    device = piece_of(parameter).device if counted else "cpu"
    state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=device)}
    if moments == "float32":
        for name in MOMENTS:
            state[name] = torch.zeros_like(parameter, dtype=widest(parameter.dtype), requires_grad=False)
        return state
    for name, form in zip(MOMENTS, FORMATS[moments], strict=True):
        moment = Stored.zeros(form, piece_of(parameter))
        state[name] = moment.codes
        if form.scaled:
            state[name + "_scales"] = moment.scales
    return state


def piece_of(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor, in its own memory; anything else as it is."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def sharded_like(piece: Tensor, parameter: Tensor) -> Tensor:
    """The sharded tensor that this rank has a piece of, if the parameter is sharded; else the piece itself."""
    if not hasattr(parameter, "to_local"):
        return piece
    from torch.distributed.tensor import DTensor

    whole = cast(DTensor, parameter)
    return DTensor.from_local(
        piece, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def is_reduced(state: dict[str, Any]) -> bool:
    """Whether the moments are kept in 16 bits."""
    return state["exp_avg"].dtype in _SETTING


def stored(state: dict[str, Any]) -> tuple[Stored, Stored]:
    """Give mean and variance of a parameter whose moments are kept in 16 bits; they share memory with the state."""
    formats = FORMATS[_SETTING[state["exp_avg"].dtype]]
    mean, variance = (
        Stored(form, state[name], state.get(name + "_scales", state["step"]))
        for name, form in zip(MOMENTS, formats, strict=True)
    )
    return mean, variance


def moment_bytes(state: dict[str, Any]) -> int:
    """Bytes of a parameter's moments, scales included."""
    moments = [piece_of(each) for name, each in state.items() if name != "step"]
    return sum(each.numel() * each.element_size() for each in moments)
