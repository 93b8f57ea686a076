"""What a registration saves, and how it goes on from it at any world size."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from distopt.attach.engine import Engine, Tally
from distopt.attach.forms import check_form, check_numbers
from distopt.attach.shards import Shards
from distopt.errors import StateError
from distopt.numerics.storage import Packed, Stored, pack, unpack
from distopt.reducers.memory import storage_of, times, working_dtype
from distopt.reducers.reducer import State

T = TypeVar("T")

FORMAT = 2
"""Version of what `Registration.state_dict` returns."""

_KEYS = {"format", "reducer", "step", "layout", "tally", "residuals", "factors"}


def gather_factors(engine: Engine) -> dict[str, Tensor] | bytes:
    """Copies of the factors, in the shortest standard dtype that holds them exactly. Collective.

    Where ranks share the parameters between them, each factor comes from the first rank that has it. Those of shards
    are put into one piece of bytes, which fits in wherever the number of shards, hence of factors, is another.
    """
    mine = {name: _values(factor).clone() for name, factor in engine.state.factors.items()}
    mine = _first_of_each(engine, mine) if engine.divided else mine
    if engine.shards is None:
        return mine
    buffer = io.BytesIO()
    torch.save(engine.shards.gather({name: factor.cpu() for name, factor in mine.items()}), buffer)
    return buffer.getvalue()


def _factors_for(engine: Engine, held: Mapping[str, Tensor] | bytes) -> Mapping[str, Tensor]:
    """What a state holds of this rank's factors; nothing if it is of another number of shards."""
    parts = [held]
    if isinstance(held, bytes):
        try:
            parts = torch.load(io.BytesIO(held), weights_only=True)
        except Exception as error:
            raise StateError(f"the factors cannot be read: {str(error).partition(chr(10))[0]}") from error
    count, index = (1, 0) if engine.shards is None else (engine.shards.count, engine.shards.index)
    return cast(Mapping[str, Tensor], parts[index]) if len(parts) == count else {}


def average_residuals(engine: Engine) -> dict[str, Tensor]:
    """Replace each residual by its mean over the ranks that keep one, and give the means in unscaled units. Collective.

    What is given is not yet rounded to the format that residuals are kept in: whoever loads it rounds it the same way.
    Of shards it is the whole residual.
    """
    engine.prepare(engine.state)
    means = _mean_residuals(engine)
    residuals = engine.state.residuals
    for name in means.keys() & residuals.keys():
        residuals[name] = _kept_like(residuals[name], means[name])
    engine.adopted = None
    means = {name: mean / engine.unit(name) for name, mean in means.items()}
    return means if engine.shards is None else _whole(engine, engine.shards, means)


def own_residuals(engine: Engine) -> dict[str, dict[str, Any]]:
    """Each residual of this rank as it is kept, with its unit, in tensors and plain values; no copies."""
    engine.prepare(engine.state)
    return {
        name: {"unit": engine.unit(name), **(_fields(kept) if isinstance(kept, Packed) else {"values": kept})}
        for name, kept in engine.state.residuals.items()
    }


def restore_own(engine: Engine, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Put residuals that `own_residuals` gave in force, in the units of the present ones.

    Raises:
        StateError: they are of other parameters, shapes or formats; nothing has been changed then.
    """
    residuals = engine.state.residuals
    if state.keys() != residuals.keys():
        odd = sorted(state.keys() ^ residuals.keys())[0]
        where = "there" if odd in state else "here"
        raise StateError(f"the residuals are of another model or reducer: {odd!r} is only {where}")
    fresh: dict[str, Stored] = {}
    for name, present in residuals.items():
        fields = {field: value for field, value in state[name].items() if field != "unit"}
        kept: Stored = fields["values"] if "values" in fields else Packed(**fields)
        if (_bits(kept).dtype, _bits(kept).shape) != (_bits(present).dtype, _bits(present).shape):
            raise StateError(f"the residual of {name!r} is kept in another shape or format here")
        moved = _bits(kept).to(_bits(present).device, copy=True)
        ratio = engine.unit(name) / state[name]["unit"]
        kept = kept._replace(codes=moved) if isinstance(kept, Packed) else moved
        fresh[name] = kept if ratio == 1 else times(kept, ratio)
    residuals.update(fresh)
    engine.adopted = None


def _whole(engine: Engine, shards: Shards, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole residuals from pieces; if there is any, of every parameter that may have one with other shards."""
    slots = [slot for slot in engine.slots.values() if slot.parameter.is_floating_point()]
    if not slots:
        return {}
    kept = shards.anywhere([slot.name in means for slot in slots], slots[0].parameter.device)
    residuals: dict[str, Tensor] = {}
    for slot, is_kept in zip(slots, kept, strict=True):
        if is_kept or (any(kept) and not slot.exempt):
            none = torch.zeros(slot.parameter.shape, dtype=working_dtype(slot), device=slot.parameter.device)
            residuals[slot.name] = shards.whole(slot.name, means.get(slot.name, none)).cpu()
    return residuals


def mean_tally(engine: Engine) -> dict[str, int]:
    """The running figures, averaged over the ranks: those that share parameters send different parts. Collective."""
    communicator = engine.communicator if engine.shards is None else engine.shards.everyone
    everyone = [dataclasses.asdict(tally) for tally in communicator.gather_objects(engine.tally)]
    return {field: sum(tally[field] for tally in everyone) // len(everyone) for field in everyone[0]}


def hand_over(engine: Engine, *, moved: bool) -> None:
    """Fit what an earlier reducer remembered to the present one. Collective.

    Args:
        engine: has the new reducer already.
        moved: whether other ranks keep the state from now on.
    """
    fresh = State(step=engine.state.step)
    engine.prepare(fresh)
    residuals, factors = engine.shapes()
    state = engine.state
    if moved:
        # What nobody keeps any more goes with the next gradient that is sent whole, which is every rank's.
        means = {n: m for n, m in _mean_residuals(engine).items() if n in fresh.residuals or n not in residuals}
        state.residuals = {name: _kept_as(fresh.residuals.get(name), mean) for name, mean in means.items()}
        state.factors = _first_of_each(engine, state.factors)
    state.factors = {
        name: _fitted(state.factors[name], first, factors[name][1]) if name in state.factors else first
        for name, first in fresh.factors.items()
    }


def _fitted(factor: Stored, first: Stored, columns: int) -> Stored:
    """As many columns of a factor as a new rank needs, filled up from the one that it would begin with."""
    old, new = _values(factor), _values(first)
    if old.shape[0] != new.shape[0]:
        return first
    if columns >= 0:
        old = torch.cat([old[:, :columns], new[:, old.shape[1] :].to(old)], dim=1)
    return _kept_like(first, old)


def _first_of_each(engine: Engine, mine: Mapping[str, T]) -> dict[str, T]:
    everyone: dict[str, T] = {}
    for theirs in engine.communicator.gather_objects(dict(mine)):
        for name in sorted(theirs):
            everyone.setdefault(name, theirs[name])
    return everyone


def _mean_residuals(engine: Engine) -> dict[str, Tensor]:
    """The mean of each residual over the ranks that keep one, in the unit that they are kept in. Collective."""
    residuals, communicator = engine.state.residuals, engine.communicator
    slots = [slot for slot in engine.slots.values() if slot.parameter.is_floating_point()]
    if not slots:
        return {}
    kept = torch.tensor([float(slot.name in residuals) for slot in slots], device=slots[0].parameter.device)
    means: dict[str, Tensor] = {}
    for slot, share in zip(slots, communicator.average_(kept).tolist(), strict=True):
        if share > 0:
            # In float64, so that the mean of equal numbers is that number: saving twice saves the same.
            mean = torch.zeros(slot.parameter.shape, dtype=torch.float64, device=slot.parameter.device)
            if slot.name in residuals:
                mean.copy_(unpack(residuals[slot.name], working_dtype(slot)))
            means[slot.name] = communicator.average_(mean).div_(share).to(working_dtype(slot))
    return means


def check_state(state: Mapping[str, Any], engine: Engine) -> None:
    """Refuse a state that is not of this model, reducer or version.

    Raises:
        StateError: with one line that says what does not fit.
    """
    if not isinstance(cast(object, state), Mapping):
        raise StateError(f"not the state of a registration: a {type(state).__name__}")
    missing = _KEYS - state.keys()
    if missing:
        raise StateError(f"not the state of a registration: {', '.join(sorted(missing))} is missing")
    if state["format"] != FORMAT:
        raise StateError(f"format is {state['format']!r}, but must be {FORMAT}")
    check_form(state)
    here = repr(engine.reducer)
    if state["reducer"].partition("(")[0] != here.partition("(")[0]:
        raise StateError(f"the state is of the reducer {state['reducer']}, but {here} is registered")
    for name in (name for names in state["layout"] for name in names):
        if name not in engine.slots:
            raise StateError(f"the state is of another model: it has {name!r}, which this one has not")
    _, factors = engine.shapes()
    # What an earlier reducer left behind may be there too, until its next gradient takes it along.
    floating = [slot for slot in engine.slots.values() if slot.parameter.is_floating_point()]
    _check_shapes("residual", state["residuals"], {slot.name: engine.whole_shape(slot) for slot in floating})
    _check_shapes("factor", _factors_for(engine, state["factors"]), factors)


def restore(state: Mapping[str, Any], engine: Engine) -> None:
    """Put a state that `check_state` found sound in force; ranks take what they keep."""
    fresh = State(step=state["step"])
    engine.prepare(fresh)
    anywhere, _ = engine.shapes()
    for name, value in state["residuals"].items():
        mine = value if engine.shards is None else engine.shards.mine(name, value)
        if name in fresh.residuals or (name not in anywhere and bool(mine.any())):
            fresh.residuals[name] = _kept_as(fresh.residuals.get(name), mine.to(engine.slots[name].parameter.device))
    for name, value in _factors_for(engine, state["factors"]).items():
        if name in fresh.factors:
            fresh.factors[name] = _kept_like(fresh.factors[name], value)
    engine.restart(fresh)
    engine.tally = Tally(**state["tally"])


def _check_shapes(kind: str, tensors: Mapping[str, Tensor], known: Mapping[str, Sequence[int]]) -> None:
    for name, tensor in tensors.items():
        there, here = tuple(tensor.shape), tuple(known.get(name, ()))
        fits = name in known and len(there) == len(here)
        if not fits or any(b not in (a, -1) for a, b in zip(there, here, strict=True)):
            kept = f"{here} here" if name in known else "which is not kept here"
            raise StateError(
                f"the state is of another model or reducer: the {kind} of {name!r} has shape {there} there, {kept}"
            )
        check_numbers(f"the {kind} of {name!r}", tensor)


def _kept_as(example: Stored | None, value: Tensor) -> Stored:
    return value.clone() if example is None else _kept_like(example, value)


def _kept_like(example: Stored, value: Tensor) -> Stored:
    """A copy of ``value`` on the device and in the format of ``example``."""
    device = (example.codes if isinstance(example, Packed) else example).device
    wide = torch.float64 if isinstance(example, Tensor) and example.dtype == torch.float64 else torch.float32
    return pack(value.detach().to(device, wide, copy=True).contiguous(), storage_of(example))


def _fields(packed: Packed) -> dict[str, Any]:
    """What is to be saved: no matter which edition kept it."""
    return packed._replace(exponent=int(packed.exponent))._asdict()


def _bits(stored: Stored) -> Tensor:
    return stored.codes if isinstance(stored, Packed) else stored


def _values(stored: Stored) -> Tensor:
    return unpack(stored) if isinstance(stored, Packed) else stored
