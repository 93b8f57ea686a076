"""Real processes over gloo, from a fork server that has loaded what they import, and never waited for without end."""

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])
_GRACE = 5.0


class RanksFailedError(AssertionError):
    """A rank raised, died, or did not finish in time; the message holds what every rank was doing."""


def run_ranks(world_size: int, job: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call ``job(rank, *args)`` on every rank of a gloo world, each a process of its own.

    Args:
        world_size: number of processes.
        job: a module-level function.
        args: what pickles.
        timeout: seconds until the stacks of all ranks are shown and the ranks are killed.

    Returns:
        What ``job`` returned, by rank.

    Raises:
        RanksFailedError: if any rank failed.
    """
    with tempfile.TemporaryDirectory() as folder, _started(_rank_main, world_size, folder, job, args) as (pipes, ranks):
        return _collect(pipes, ranks, Path(folder), time.monotonic() + timeout)


@dataclass
class Fate:
    """How a rank ended that was allowed to die.

    Args:
        said: what it told by the function that its job was given.
        error: what its job raised, type and text; empty if it raised nothing.
        ended: when it raised or died, in seconds of ``time.monotonic``.
        code: its exit code; None if it never ended.
    """

    said: list[Any] = field(default_factory=list)
    error: str = ""
    ended: float = 0.0
    code: int | None = None


def run_mortals(
    world_size: int, job: Callable[..., Any], *args: Any, immortal: Iterable[int] = (), timeout: float = 60.0
) -> list[Fate]:
    """Call ``job(rank, say, folder, *args)`` on ranks that may die. Each has to end by itself, whatever the others do.

    Args:
        world_size: number of processes.
        job: a module-level function; it initialises its process group itself. ``say(value)`` tells the test something,
            ``folder`` is one that all ranks share.
        args: what pickles.
        immortal: ranks that are not waited for, because they are stopped.
        timeout: seconds until the stacks of all ranks are shown and the ranks are killed.

    Returns:
        The fate of each rank.

    Raises:
        RanksFailedError: if a rank does not end in time.
    """
    deadline = time.monotonic() + timeout
    with (
        tempfile.TemporaryDirectory() as folder,
        _started(_mortal_main, world_size, folder, job, args) as (pipes, ranks),
    ):
        fates = [Fate() for _ in ranks]
        alive = dict(zip(pipes, range(world_size), strict=True))
        while waiting := {pipe: rank for pipe, rank in alive.items() if rank not in immortal}:
            ready = multiprocessing.connection.wait(list(alive), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                stacks = _stacks(ranks, sorted(waiting.values()), Path(folder))
                raise RanksFailedError(f"ranks {sorted(waiting.values())} did not end\n{fates}\n{stacks}")
            for pipe in ready:
                fate = fates[alive[pipe]]
                try:
                    kind, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    rank = alive.pop(pipe)
                    ranks[rank].join(max(0.0, deadline - time.monotonic()))
                    fate.code, fate.ended = ranks[rank].exitcode, fate.ended or time.monotonic()
                    continue
                if kind == "said":
                    fate.said.append(value)
                else:
                    fate.error, fate.ended = value, time.monotonic()
        return fates


@contextlib.contextmanager
def _started(
    main: Callable[..., None], world_size: int, folder: str, job: Callable[..., Any], args: tuple[Any, ...]
) -> Iterator[tuple[list[Any], list[Any]]]:
    """Processes of all ranks and our ends of their pipes; in the end they are killed."""
    pipes, ranks = [], []
    try:
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=main, args=(rank, world_size, folder, theirs, job, args), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            ranks.append(process)
        yield pipes, ranks
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _collect(pipes: list[Any], ranks: list[Any], folder: Path, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(results) + len(failures) < len(ranks):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results and rank not in failures}
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            stacks = _stacks(ranks, list(waiting.values()), folder)
            raise RanksFailedError(f"ranks {sorted(waiting.values())} did not finish\n{stacks}\n{_text(failures)}")
        for pipe in ready:
            rank = waiting[pipe]
            try:
                kind, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                kind, value = "error", f"died with exit code {ranks[rank].exitcode}"
            if kind == "result":
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + _GRACE)
    if failures:
        raise RanksFailedError(_text(failures))
    return [results[rank] for rank in range(len(ranks))]


def _text(failures: dict[int, str]) -> str:
    return "\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items()))


def _stacks(ranks: list[Any], hung: list[int], folder: Path) -> str:
    for rank in hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[rank].pid, signal.SIGUSR1)
    time.sleep(0.5)
    files = {rank: folder / f"stacks{rank}" for rank in range(len(ranks))}
    return "\n".join(f"--- rank {rank}\n{file.read_text()}" for rank, file in files.items() if file.exists())


def _rank_main(
    rank: int, world_size: int, folder: str, pipe: Any, job: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    stacks = open(f"{folder}/stacks{rank}", "w")
    faulthandler.register(signal.SIGUSR1, file=stacks)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=50),
        )
        result = job(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps(("result", result)))
    except BaseException:
        pipe.send_bytes(pickle.dumps(("error", traceback.format_exc())))
        pipe.close()
        os._exit(1)


def _mortal_main(
    rank: int, world_size: int, folder: str, pipe: Any, job: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """As a script would, it ends when its threads let it; nothing cuts it short."""
    faulthandler.register(signal.SIGUSR1, file=open(f"{folder}/stacks{rank}", "w"))
    torch.set_num_threads(1)
    try:
        job(rank, lambda value: pipe.send_bytes(pickle.dumps(("said", value))), folder, *args)
    except Exception as error:
        pipe.send_bytes(pickle.dumps(("error", f"{type(error).__name__}: {error}")))
