"""Ranks: started by the command itself, or given by ``torchrun``.

A command that finds no ranks starts itself again once per rank and watches over them: when one dies, the others are
ended within seconds, and the user reads one line about the rank that failed first. Ranks hold on to the parent by a
pipe, so that they end with it even when it is killed. The parent never imports torch.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .fields import InputError

MEETING = "DISTOPT_MEETING"
"""Environment variable: the folder where ranks that we started find each other and leave word of their errors."""
MOST = 64
"""Ranks that `start` may start."""
_GRACE_SECONDS = 5.0
_SAVING_SECONDS = 60.0
"""How long ranks may take to save when the user has asked them to stop."""
_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 0.2
FAILED, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM


@dataclass(frozen=True)
class Command:
    """A command that starts ranks.

    Args:
        name: what the user types; begins each line on stderr.
        module: what each rank runs, as ``python -m`` does.
    """

    name: str
    module: str

    def tell(self, line: str) -> None:
        """Say one line on stderr."""
        print(f"{self.name}: {line}", file=sys.stderr)


class Stopped(Exception):
    """A signal asked to stop, and everything has been saved.

    Args:
        number: the signal.
        step: after which step of which stage.
    """

    def __init__(self, number: int, step: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} and saved after {step}")
        self.number = number


@dataclass(frozen=True)
class Place:
    """This process among the ranks."""

    rank: int
    world_size: int
    local_rank: int


def place(environment: Mapping[str, str] | None = None) -> Place | None:
    """Where this process stands, from the environment that ``torchrun`` (or ``start``) gives; ``None`` if nobody did.

    Raises:
        InputError: the three variables are there and make no sense together.

    Example:
        >>> place({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
        Place(rank=1, world_size=2, local_rank=1)
        >>> place({"RANK": "1"}) is None
        True
    """
    environment = os.environ if environment is None else environment
    given = [environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if None in given:
        return None
    try:
        rank, world_size, local_rank = (int(value or "") for value in given)
    except ValueError:
        rank, world_size, local_rank = 0, 0, 0
    if not (0 <= rank < world_size and local_rank >= 0):
        raise InputError(f"RANK, WORLD_SIZE and LOCAL_RANK are {given} in the environment, which name no place")
    return Place(rank, world_size, local_rank)


def place_or_none() -> Place | None:
    """As `place`, for when an error is to be reported: an environment that makes no sense counts as none."""
    try:
        return place()
    except InputError:
        return None


def started_by_us() -> bool:
    """Whether `start` started this process, rather than ``torchrun`` or the user."""
    return MEETING in os.environ


def start(command: Command, arguments: Sequence[str], ranks: int, error_log: Path) -> int:
    """Run a command again as ``ranks`` processes and wait for all of them.

    Args:
        command: which.
        arguments: the command's arguments, as the user gave them.
        ranks: how many processes.
        error_log: where the traceback of a rank that failed unexpectedly is kept.

    Returns:
        0, or the exit code that the user gets: 2 if a rank refused its input, 130 on Ctrl-C and 143 on SIGTERM, 1
        otherwise. What went wrong has been said on stderr in one line. Ranks that are told to stop may save first; a
        second Ctrl-C ends them at once.
    """
    error_log.unlink(missing_ok=True)
    meeting = Path(tempfile.mkdtemp(prefix="distopt-"))
    processes: list[subprocess.Popen[bytes]] = []
    told = [INTERRUPTED]
    try:
        with _terminate_as_interrupt() as told:
            processes.extend(_spawn([command.module, *arguments], rank, ranks, meeting) for rank in range(ranks))
            while None in (codes := [process.poll() for process in processes]) and not any(codes):
                time.sleep(_POLL_SECONDS)
            if not any(codes):
                return 0
            # The rank that fell first may be noticed last; whoever we end ourselves is not to blame.
            time.sleep(_SETTLE_SECONDS)
            codes = [process.poll() for process in processes]
            _end(processes)
            return _explain(command, codes, meeting, error_log)
    except KeyboardInterrupt:
        _end(processes, _SAVING_SECONDS)
        command.tell("interrupted")
        return told[0]
    finally:
        _end(processes)
        shutil.rmtree(meeting, ignore_errors=True)
        if processes and sys.stdout.isatty():
            # A rank that was ended in the middle of its progress bar leaves the cursor hidden.
            print("\x1b[?25h", end="", flush=True)


def check_startable(ranks: int) -> None:
    """Refuse to start more processes than one machine is for.

    Raises:
        InputError: there are too many; names another way.
    """
    if ranks > MOST:
        raise InputError(f"--ranks {ranks}: at most {MOST} are started here; torchrun starts them on several machines")


def check_devices(device: str, ranks: int) -> None:
    """Refuse a device that this machine cannot give to every rank; torch is only asked about "cuda".

    Raises:
        InputError: there are fewer CUDA devices than ranks.
    """
    if device != "cuda":
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < ranks:
        raise InputError(f"--device cuda: {ranks} ranks need a CUDA device each, but this machine has {found}")


def _spawn(command: Sequence[str], rank: int, ranks: int, meeting: Path) -> subprocess.Popen[bytes]:
    environment = {
        # One thread a rank: two that compete for a core are slower than one, and idle ones must not spin.
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "100",
        **({"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}),
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        # The same modules as here, whatever lies in the working directory.
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        MEETING: str(meeting),
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *command],
        env=environment,
        stdin=subprocess.PIPE,
        # Ctrl-C reaches the parent alone, which then ends the ranks quietly.
        start_new_session=True,
    )


def _end(processes: Sequence[subprocess.Popen[bytes]], grace: float = _GRACE_SECONDS) -> None:
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    limit = time.monotonic() + grace
    for process in running:
        try:
            process.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()


def _explain(command: Command, codes: Sequence[int | None], meeting: Path, error_log: Path) -> int:
    """Say in one line what went wrong first, and keep its traceback; returns the exit code."""
    for code in codes:
        if code in (INTERRUPTED, TERMINATED):
            command.tell("interrupted")
            return code
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            # A rank that was killed could not leave word, and the others only report that it is gone.
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            name = signal.Signals(-code).name
            command.tell(f"error: rank {rank} was killed by {name}{hint}")
            return FAILED
    words = sorted(meeting.glob("rank-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if not words:
        ended = ", ".join(f"rank {rank} with exit code {code}" for rank, code in enumerate(codes) if code)
        command.tell(f"error: ended early: {ended}")
        return FAILED
    line, _, details = words[0].read_text(encoding="utf-8").partition("\n")
    rank = re.sub(r"\D", "", words[0].stem)
    if not details:
        command.tell(f"error: {line}")
        return REFUSED
    kept = ""
    with contextlib.suppress(OSError):
        error_log.write_text(details, encoding="utf-8")
        kept = f" (traceback in {error_log})"
    command.tell(f"error: rank {rank} failed: {line}{kept}")
    return FAILED


@contextlib.contextmanager
def _terminate_as_interrupt() -> Generator[list[int]]:
    """SIGTERM is taken as Ctrl-C; gives a list with the exit code of an interrupt."""
    code = [INTERRUPTED]

    def interrupt(number: int, frame: object) -> None:
        code[0] = TERMINATED
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield code
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield code
    finally:
        signal.signal(signal.SIGTERM, before)
