"""The command ``distopt``: reads its arguments, and refuses what is wrong before it loads what takes seconds."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from distopt.commands import doctor, planning, report
from distopt.commands.completion import add_completion
from distopt.errors import DistoptError

REFUSED, INTERRUPTED = 2, 130
_CODES = """exit codes:
  0  done
  1  something does not work (doctor)
  2  the arguments or the input cannot be worked with; one line on stderr says why
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """Give what reads the arguments; its result has a function ``run(parsed)``, which returns an exit code."""
    parser = _Parser(
        prog="distopt",
        description="Plugins that make a PyTorch trainer cheap to distribute.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_completion(parser)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    planning.add_to(commands)
    doctor.add_to(commands)
    report.add_to(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: what follows the command's name; ``None`` takes those of this process.

    Returns:
        The exit code; 0, 1 if something does not work that was asked about, 2 for bad settings or input (one line on
        stderr has said what), 130 after Ctrl-C.
    """
    try:
        parsed = make_parser().parse_args(arguments)
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
