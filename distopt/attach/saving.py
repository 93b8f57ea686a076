"""What a registration saves, and how it goes on from it at any world size."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distopt.attach.engine import Engine
from distopt.errors import StateError
from distopt.numerics.storage import Packed, Stored, pack, unpack
from distopt.reducers.memory import storage_of, working_dtype
from distopt.reducers.reducer import State

FORMAT = 2
"""Version of what `Registration.state_dict` returns."""

_KEYS = {"format", "reducer", "step", "layout", "tally", "residuals", "factors"}


def gather_factors(engine: Engine) -> dict[str, Tensor]:
    """Copies of the factors, in the shortest standard dtype that holds them exactly. Collective.

    Where ranks share the parameters between them, each factor comes from the first rank that has it.
    """
    mine = {name: _values(factor).clone() for name, factor in engine.state.factors.items()}
    if not engine.reducer.parts(engine.communicator.world_size):
        return mine
    everyone: dict[str, Tensor] = {}
    for theirs in engine.communicator.gather_objects(mine):
        for name in sorted(theirs):
            everyone.setdefault(name, theirs[name])
    return everyone


def average_residuals(engine: Engine) -> dict[str, Tensor]:
    """Replace each residual by its mean over the ranks that keep one, and give the means in unscaled units. Collective.

    What is given is not yet rounded to the format that residuals are kept in: whoever loads it rounds it the same way.
    """
    state, communicator = engine.state, engine.communicator
    engine.prepare(state)
    slots = [slot for slot in engine.slots.values() if slot.parameter.is_floating_point()]
    if not slots:
        return {}
    kept = torch.tensor([float(slot.name in state.residuals) for slot in slots], device=slots[0].parameter.device)
    shares = communicator.average_(kept).tolist()
    means: dict[str, Tensor] = {}
    for slot, share in zip(slots, shares, strict=True):
        if share == 0:
            continue
        mine = state.residuals.get(slot.name)
        mean = torch.zeros(slot.parameter.shape, dtype=working_dtype(slot), device=slot.parameter.device)
        if mine is not None:
            mean.copy_(unpack(mine, mean.dtype))
        communicator.average_(mean).div_(share)
        if mine is not None:
            state.residuals[slot.name] = _kept_like(mine, mean)
        means[slot.name] = mean / engine.loss_scale
    return means


def check_state(state: Mapping[str, Any], engine: Engine) -> None:
    """Refuse a state that is not of this model, reducer or version.

    Raises:
        StateError: with one line that says what does not fit.
    """
    missing = _KEYS - state.keys()
    if missing:
        raise StateError(f"not the state of a registration: {', '.join(sorted(missing))} is missing")
    if state["format"] != FORMAT:
        raise StateError(f"format is {state['format']!r}, but must be {FORMAT}")
    for name in (name for names in state["layout"] for name in names):
        if name not in engine.slots:
            raise StateError(f"the state is of another model: it has {name!r}, which this one has not")
    residuals, factors = engine.shapes()
    _check_shapes("residual", state["residuals"], residuals)
    _check_shapes("factor", state["factors"], factors)


def restore(state: Mapping[str, Any], engine: Engine) -> None:
    """Put a state that `check_state` found sound in force; ranks take what they keep."""
    fresh = State(step=state["step"])
    engine.prepare(fresh)
    for name, value in state["residuals"].items():
        if name in fresh.residuals:
            fresh.residuals[name] = _kept_like(fresh.residuals[name], value)
    for name, value in state["factors"].items():
        if name in fresh.factors:
            fresh.factors[name] = _kept_like(fresh.factors[name], value)
    engine.restart(fresh)
    for field, value in state["tally"].items():
        setattr(engine.tally, field, value)


def _check_shapes(kind: str, tensors: Mapping[str, Tensor], known: Mapping[str, Sequence[int]]) -> None:
    for name, tensor in tensors.items():
        there, here = tuple(tensor.shape), tuple(known.get(name, ()))
        fits = name in known and len(there) == len(here)
        if not fits or any(b not in (a, -1) for a, b in zip(there, here, strict=True)):
            kept = f"{here} here" if name in known else "which is not kept here"
            raise StateError(
                f"the state is of another model or reducer: the {kind} of {name!r} has shape {there} there, {kept}"
            )


def _kept_like(example: Stored, value: Tensor) -> Stored:
    """A copy of ``value`` on the device and in the format of ``example``."""
    device = (example.codes if isinstance(example, Packed) else example).device
    wide = torch.float64 if isinstance(example, Tensor) and example.dtype == torch.float64 else torch.float32
    return pack(value.detach().to(device, wide, copy=True).contiguous(), storage_of(example))


def _values(stored: Stored) -> Tensor:
    return unpack(stored) if isinstance(stored, Packed) else stored
