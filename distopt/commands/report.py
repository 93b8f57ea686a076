"""``distopt report``: one page about a run, from its event files."""

import argparse
from pathlib import Path
from typing import Any

_EXAMPLES = """examples:
  distopt report runs/demo                        writes runs/demo/report.html
  distopt report lightning_logs --out today.html  of anybody's event files

A loop of your own has such a folder by one line: distopt.record(registration, "runs/mine", optimizer)
"""


def add_to(commands: Any) -> None:
    """Add the command to what `ArgumentParser.add_subparsers` gave."""
    parser = commands.add_parser(
        "report",
        help="write a page with plots of a run: saving, errors by layer, scales, losses, step times",
        description="Write one HTML page, which needs nothing else, with plots of what TensorBoard's event files in a "
        "folder hold.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a folder with event files, in it or below")
    parser.add_argument("--out", type=Path, metavar="F.html", help="the page (default: report.html in RUN)")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    from distopt.monitor.page import write_report

    out: Path = parsed.run_folder / "report.html" if parsed.out is None else parsed.out
    write_report(parsed.run_folder, out)
    print(out)
    return 0
