"""A command line that checks what it is given, and only then imports what takes seconds."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from distopt.commands.completion import add_completion
from distopt.errors import DistoptError

from . import launch
from .fields import MAX_SEED, InputError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """End with one line on stderr and exit code 2."""
        self.exit(launch.REFUSED, f"{self.prog}: error: {message}\n")


def run(command: launch.Command, parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Do what a command is told.

    Args:
        command: which.
        parser: whose result has a function ``run(parsed, given)``, which returns an exit code.
        arguments: what follows the command's name; ``None`` takes those of this process.

    Returns:
        The exit code: 0, 2 for bad settings or input (one line on stderr has said what), 130 after Ctrl-C, 1 otherwise.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    add_completion(parser)
    try:
        parsed = parser.parse_args(given)
        return parsed.run(parsed, given)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else launch.FAILED
    except DistoptError as error:
        place = launch.place_or_none()
        if place is None or place.rank == 0:
            command.tell(f"error: {error}")
        return launch.REFUSED
    except KeyboardInterrupt:
        command.tell("interrupted")
        return launch.INTERRUPTED


def add_device(parser: argparse.ArgumentParser) -> None:
    """The flag ``--device``."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")


def add_ranks(parser: argparse.ArgumentParser, most: int = launch.MOST) -> None:
    """The flag ``--ranks``, up to ``most``."""
    meaning = "processes that train together (default: 2; under torchrun, those that it started)"
    parser.add_argument("--ranks", type=whole(1, most), default=2, metavar="N", help=meaning)


def whole(low: int, high: int) -> Callable[[str], int]:
    """Give what reads a whole number from ``low`` to ``high``, for ``add_argument(type=...)``."""
    words = f"a whole number from {low} to {high}" if high < MAX_SEED else f"a whole number from {low} to 2**63 - 1"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"is {text!r}, but must be {words}")
        return value

    return parse


def make_writable(flag: str, folder: Path) -> None:
    """Make ``folder`` and try to write there.

    Raises:
        InputError: it cannot be; names the flag.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot be written to: {error.strerror}") from None


def check_writable(flag: str, folder: Path) -> None:
    """Check that ``folder`` could be made and written to, and leave everything as it is.

    Raises:
        InputError: it could not; names the flag.
    """
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder}: cannot be written to: {nearest} is not a folder that we may write to")
