"""Completion in the user's shell: a command prints a script that its shell reads once, and is not run at a TAB."""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distopt.errors import MissingPackageError

SHELLS = ("bash", "zsh", "fish", "tcsh")


class _Print(argparse.Action):
    """Prints the script and ends the command."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        print(script(parser, values))
        parser.exit()


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add the flag ``--print-completion SHELL``.

    Args:
        parser: of a whole command; what it completes are the command's own subcommands, flags, choices and files.
    """
    parser.add_argument(
        "--print-completion", action=_Print, choices=SHELLS, metavar="SHELL",
        help=f"print a script that completes this command in {', '.join(SHELLS[:-1])} or {SHELLS[-1]}, and exit",
    )  # fmt: skip


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Give the script that completes a command.

    Args:
        parser: of the command.
        shell: one of `SHELLS`.

    Raises:
        MissingPackageError: shtab is not installed.

    Example:
        >>> parser = argparse.ArgumentParser(prog="greet")
        >>> _ = parser.add_argument("--name", help="of whom")
        >>> "--name" in script(parser, "bash")
        True
    """
    try:
        shtab = importlib.import_module("shtab")
    except ImportError:
        raise MissingPackageError("shtab", "completion") from None
    for action in _actions(parser):
        if action.type is Path:
            setattr(action, "complete", shtab.FILE)  # noqa: B010  argparse knows of no such attribute
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its subcommands."""
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
        yield action
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            for inner in {id(each): each for each in action.choices.values()}.values():
                yield from _actions(inner)
