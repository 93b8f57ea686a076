"""Loading: the newest whole checkpoint, on any number of ranks, and nothing changed before all of it is read."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from distopt.checkpoint.files import read
from distopt.checkpoint.generators import restore_generators
from distopt.checkpoint.ranks import Ranks, one_line
from distopt.checkpoint.store import entries, examine, read_manifest, step_of
from distopt.checkpoint.values import PerRank, check_thing, is_sharded, own_module, put, state_of
from distopt.errors import CheckpointError


def latest(folder: str | os.PathLike[str]) -> int | None:
    """Tell the step of the newest whole checkpoint. Not collective; it reads every byte of it.

    Args:
        folder: of the run; need not exist.

    Returns:
        None if there is no checkpoint. A damaged one is passed over with a warning.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged.

    Example:
        >>> latest("no such folder")
    """
    place = Path(folder)
    return step_of(_newest_whole(place)) if entries(place) else None


def load(folder: str | os.PathLike[str], *, step: int | None = None, rng: bool = True, **stateful: Any) -> int:
    """Go on from the newest whole checkpoint. Collective, with any number of ranks.

    Everything is read and checked on every rank before anything is changed. A damaged checkpoint is passed over with a
    warning that names the damage, unless its step was asked for. What was saved, but is not asked for, is left alone.

    Args:
        folder: of the run; all ranks share it.
        step: load the newest checkpoint of this step instead, and no other.
        rng: put the random generators of each rank where they were. At another number of ranks they stay as they are.
        stateful: what to load, by the names that `save` was given; DTensors take their part of what was saved whole.

    Returns:
        The step that was given to `save`.

    Raises:
        CheckpointError: on every rank: there is no checkpoint, or none that is whole, or it does not hold or fit
            what is asked for. If it does not fit, things named before may have been loaded already.

    Example:
        >>> import tempfile, torch
        >>> from distopt import checkpoint
        >>> progress = {"epoch": 3}
        >>> with tempfile.TemporaryDirectory() as run:
        ...     checkpoint.save(run, 100, progress=progress)
        ...     progress["epoch"] = 4
        ...     print(checkpoint.load(run, progress=progress), progress)
        100 {'epoch': 3}
    """
    ranks, place = Ranks(), Path(folder)
    ranks.together(lambda: [check_thing(name, thing) for name, thing in stateful.items()])
    ranks.agree([("step", str(step)), *((name, str(isinstance(t, PerRank))) for name, t in stateful.items())])
    entry = place / ranks.first(lambda: (_newest_whole(place) if step is None else _of_step(place, step)).name)
    shared, mine = ranks.together(lambda: _read(entry, ranks, stateful))
    for name, thing in stateful.items():
        ranks.together(lambda name=name, thing=thing: _put(entry, name, thing, shared, mine))
    if rng and mine is not None:
        ranks.together(lambda: restore_generators(mine["generators"]))
    return step_of(entry)


def _newest_whole(folder: Path) -> Path:
    """The newest checkpoint that holds what was saved; tell what is wrong with newer ones."""
    damages: list[str] = []
    for entry in entries(folder):
        try:
            examine(entry)
        except CheckpointError as error:
            damages.append(str(error))
            continue
        for damage in damages:
            warnings.warn(f"{damage}; {entry.name} is used instead", RuntimeWarning, stacklevel=5)
        return entry
    if damages:
        raise CheckpointError(f"no checkpoint in {folder} is whole: {damages[0]}")
    raise CheckpointError(f"there is no checkpoint in {folder}")


def _of_step(folder: Path, step: int) -> Path:
    for entry in entries(folder):
        if step_of(entry) == step:
            examine(entry)
            return entry
    there = ", ".join(str(step_of(entry)) for entry in entries(folder)) or "none"
    raise CheckpointError(f"there is no checkpoint of step {step} in {folder}, only: {there}")


def _read(entry: Path, ranks: Ranks, stateful: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """What is asked for, and what this rank saved; the latter is None at another number of ranks."""
    manifest = read_manifest(entry)
    shared = [name for name, thing in stateful.items() if not isinstance(thing, PerRank)]
    saved = sorted(name.removesuffix(".pt") for name in manifest.files if not name.startswith("rank-"))
    for name in shared:
        if name not in saved:
            raise CheckpointError(f"{entry} holds no {name!r} for all ranks, only: {', '.join(saved) or 'none'}")
    states = {name: read(entry / f"{name}.pt", manifest.files[f"{name}.pt"]) for name in shared}
    if manifest.world_size != ranks.count:
        for name in stateful.keys() - states.keys():
            raise CheckpointError(
                f"{name!r} in {entry} is of each of {manifest.world_size} ranks: {ranks.count} cannot load it"
            )
        return states, None
    own = f"rank-{ranks.rank}.pt"
    mine = read(entry / own, manifest.files[own])
    for name in stateful.keys() - states.keys():
        if name not in mine["own"]:
            raise CheckpointError(f"{entry} holds no {name!r} of each rank")
    return states, mine


def _put(entry: Path, name: str, thing: Any, shared: dict[str, Any], mine: Any) -> None:
    try:
        if isinstance(thing, PerRank):
            put(thing.thing, mine["own"][name])
        else:
            # Let go of each state, which may be as large as the model, when it is loaded.
            put(thing, _divided(own_module(thing), shared.pop(name)))
    except Exception as error:
        raise CheckpointError(f"{name!r} of {entry} does not fit: {one_line(error)}") from error


def _divided(thing: Any, saved: dict[str, Any]) -> Any:
    """Give each DTensor of a thing, or of an optimizer's parameters, its part of a whole tensor."""
    state = saved["state"]
    if isinstance(thing, Optimizer):
        parameters = [parameter for group in thing.param_groups for parameter in group["params"]]
        keys = [key for group in state["param_groups"] for key in group["params"]]
        like = dict(zip(keys, parameters, strict=False))
        states = {
            key: {name: _part(value, like.get(key)) for name, value in values.items()}
            for key, values in state["state"].items()
        }
        return {**state, "state": states}
    if saved["sharded"] or isinstance(thing, nn.Module):
        return _parts(state, state_of(thing))
    return state


def _parts(state: Any, like: Any) -> Any:
    """Replace tensors of a state, in mappings inside of mappings, by their parts."""
    if isinstance(state, dict) and isinstance(like, Mapping):
        for key in cast(dict[Any, Any], state):
            state[key] = _parts(state[key], cast(Mapping[Any, Any], like).get(key))
        return cast(Any, state)
    return _part(state, like)


def _part(value: Any, like: Any) -> Any:
    if not is_sharded(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every rank has read the whole tensor: nothing is sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
