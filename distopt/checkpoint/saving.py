"""Saving: all ranks collect their states, the first writes what is the same on all, each writes what is its own."""

import contextlib
import os
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from distopt.checkpoint.files import Digest, write
from distopt.checkpoint.generators import generator_states
from distopt.checkpoint.ranks import Ranks
from distopt.checkpoint.store import Manifest, begin, publish, retain
from distopt.checkpoint.values import PerRank, check_state, check_thing, is_sharded, mapped, state_of, to_cpu
from distopt.errors import SettingError


def save(folder: str | os.PathLike[str], step: int, *, keep: int | None = None, **stateful: Any) -> None:
    """Save a checkpoint beside those that are there, and make it the current one in one atomic step. Collective.

    When it returns, everything is on the disk. Killed at any moment, or out of space at any write, it leaves the older
    checkpoints as they were. What a crashed save left behind is removed by the next.

    Saved are the states of ``stateful`` on the first rank, and on every rank its random generators: Python's, NumPy's
    if it is loaded, torch's on CPU and CUDA. Sharded tensors (DTensors) are gathered on the first rank's CPU, one after
    the other, and saved whole, so that another number of ranks can load them.

    Args:
        folder: of the run; all ranks share it. It is made if need be. One run at a time saves there.
        step: at least 0; what `load` returns.
        keep: remove all but so many of the newest checkpoints; never the newest that is whole. None: keep all.
        stateful: by the name to save under, things with ``state_dict()`` and ``load_state_dict()`` (modules, DDP
            models, optimizers, schedulers, a Registration, a GradScaler), dictionaries, ``torch.Generator``, and
            anything plain in a `Value`. What differs between ranks goes into a `PerRank`. The states hold tensors and
            plain values.

    Raises:
        SettingError: an argument is not allowed; nothing was written.
        AgreementError: on every rank, if they save different things.
        CheckpointError: on every rank, if a state holds something else, or the system refused a write on any.

    Example:
        >>> import tempfile, torch
        >>> from distopt import checkpoint
        >>> model = torch.nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as run:
        ...     checkpoint.save(run, 100, keep=2, model=model, progress={"epoch": 3})
        ...     checkpoint.latest(run)
        100
    """
    ranks, place = Ranks(), Path(folder)
    ranks.together(lambda: _check(step, keep, stateful))
    ranks.agree([("step", str(step)), *((name, str(isinstance(t, PerRank))) for name, t in stateful.items())])
    shared: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name, thing in stateful.items():
        states, thing = (own, thing.thing) if isinstance(thing, PerRank) else (shared, thing)
        # The state of a registration is itself collective: no rank may come to it before all others can.
        states[name] = ranks.together(lambda thing=thing: state_of(thing))
    ranks.together(lambda: _check_states(shared, own))
    mine = {"generators": generator_states(), "own": mapped(own, to_cpu)}
    with contextlib.ExitStack() as stack:
        draft = Path(ranks.first(lambda: str(stack.enter_context(begin(place)))))
        digests = ranks.together(lambda: _write(ranks.rank, draft, shared, mine))
        everyone: dict[str, Digest] = {}
        for theirs in ranks.gather(digests):
            everyone.update(theirs)
        ranks.first(lambda: _finish(draft, Manifest(step, ranks.count, everyone), keep))


def _check(step: Any, keep: Any, stateful: dict[str, Any]) -> None:
    for field, value, least in (("step", step, 0), ("keep", keep, 1)):
        if field == "keep" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise SettingError(f"checkpoint.save's {field}", value, f"an integer of at least {least}")
    for name, thing in stateful.items():
        check_thing(name, thing)


def _check_states(shared: dict[str, Any], own: dict[str, Any]) -> None:
    for name, state in shared.items():
        check_state(name, state)
    for name, state in own.items():
        check_state(name, state)
        mapped(state, lambda tensor, name=name: _check_whole(name, tensor))


def _check_whole(name: str, tensor: Tensor) -> None:
    if is_sharded(tensor):
        raise SettingError(f"checkpoint's {name}", "PerRank of a DTensor", "saved without PerRank, which gathers it")


def _write(rank: int, draft: Path, shared: dict[str, Any], mine: Any) -> dict[str, Digest]:
    """Write this rank's files. A failure is raised when all is gathered: the other ranks need us for that."""
    written: dict[str, Digest] = {}
    problem: Exception | None = None
    for name, state in shared.items():
        wanted = rank == 0 and problem is None
        content = {"sharded": _has_parts(state), "state": mapped(state, _whole if wanted else _help)}
        if wanted:
            try:
                written[f"{name}.pt"] = write(draft / f"{name}.pt", content)
            except Exception as error:
                problem = error
    if problem is not None:
        raise problem
    written[f"rank-{rank}.pt"] = write(draft / f"rank-{rank}.pt", mine)
    return written


def _help(tensor: Tensor) -> None:
    """Take part in gathering a sharded tensor that this rank does not write."""
    if is_sharded(tensor):
        cast(Any, tensor.detach()).full_tensor()


def _whole(tensor: Tensor) -> Tensor:
    return to_cpu(cast(Any, tensor.detach()).full_tensor() if is_sharded(tensor) else tensor)


def _has_parts(state: Any) -> bool:
    found: list[bool] = []
    mapped(state, lambda tensor: found.append(is_sharded(tensor)))
    return any(found)


def _finish(draft: Path, manifest: Manifest, keep: int | None) -> None:
    publish(draft, manifest)
    if keep is not None:
        retain(draft.parent, keep)
