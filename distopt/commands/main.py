"""The command ``distopt``: reads its arguments, and refuses what is wrong before it loads what takes seconds."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from distopt.commands import doctor, planning, report
from distopt.errors import DistoptError

REFUSED, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: what follows the command's name; ``None`` takes those of this process.

    Returns:
        The exit code: 0, 2 for bad settings or input (one line on stderr has said what), 130 after Ctrl-C.
    """
    parser = _Parser(prog="distopt", description="Plugins that make a PyTorch trainer cheap to distribute.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    planning.add_to(commands)
    doctor.add_to(commands)
    report.add_to(commands)
    try:
        parsed = parser.parse_args(arguments)
        return parsed.run(parsed)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except DistoptError as error:
        print(f"distopt: error: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("distopt: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
