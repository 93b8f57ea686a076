"""One rank: joins the others, does its task, and leaves word of what went wrong."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from distopt.errors import DistoptError

from .launch import FAILED, INTERRUPTED, MEETING, REFUSED, Command, Place, Stopped

_PATIENCE = timedelta(minutes=30)


def work(command: Command, where: Place, device: str, task: Callable[[torch.device], None]) -> int:
    """Join the other ranks and do ``task`` with them.

    Args:
        command: which.
        where: this process among the ranks.
        device: "cpu" (gloo) or "cuda" (nccl, one device a rank).
        task: what to do; every rank does it, on the device that it is given.

    Returns:
        0. After any error the process ends here and now, with its exit code: communication that waits for other ranks
        must not keep it alive. A run that was stopped by a signal and saved ends with 128 + the signal's number.
    """
    meeting = os.environ.get(MEETING)
    if meeting is not None:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with _process_group(where, device, meeting) as torch_device:
            task(torch_device)
        return 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Stopped as stopped:
        code = 128 + stopped.number
        if where.rank == 0:
            command.tell(f"{stopped}; the same command goes on from there")
    except Exception as error:
        refused = isinstance(error, DistoptError)
        code = REFUSED if refused else FAILED
        if meeting is not None:
            line = str(error) if refused else _one_line(error)
            _leave_word(Path(meeting), where.rank, line, "" if refused else traceback.format_exc())
        elif refused:
            command.tell(f"error: {error}")
        else:
            traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def single_thread() -> None:
    """Let torch use one thread in this process, or as many as the user's ``OMP_NUM_THREADS`` says.

    Models of this size are slower with two threads than with one when anything else runs.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(max(1, int(wanted)) if wanted.isdigit() else 1)


@contextlib.contextmanager
def _process_group(where: Place, device: str, meeting: str | None) -> Generator[torch.device]:
    single_thread()
    chosen = torch.device("cpu")
    if device == "cuda":
        chosen = torch.device("cuda", where.local_rank)
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=_store(where, meeting),
        rank=where.rank,
        world_size=where.world_size,
        timeout=_PATIENCE,
    )
    yield chosen
    # Nobody leaves while another rank is still talking to it.
    dist.barrier()
    dist.destroy_process_group()


def _store(where: Place, meeting: str | None) -> dist.Store:
    """Where the ranks find each other: in our folder, or at the address that torchrun gives."""
    if meeting is not None:
        return dist.FileStore(f"{meeting}/store", where.world_size)
    store, _, _ = next(dist.rendezvous("env://", where.rank, where.world_size, timeout=_PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # After a restart torchrun may give its old store again, with the addresses of ranks that are dead. Its count
        # of restarts is the same for all ranks on one machine.
        store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def _leave_word(meeting: Path, rank: int, line: str, details: str) -> None:
    with contextlib.suppress(OSError):
        (meeting / f"rank-{rank}.txt").write_text(f"{line}\n{details}", encoding="utf-8")


def _one_line(error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _end_with_parent() -> None:
    # The parent never writes; the read ends when the parent does, however it ended.
    with contextlib.suppress(OSError, ValueError):
        os.read(0, 1)
    os._exit(128 + signal.SIGTERM)
