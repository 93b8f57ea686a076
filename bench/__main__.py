"""Runs a short form of the benches, one after another, and renders the pages of the documentation from what they wrote.

    python -m bench                                  # what ``make bench`` does: 14 minutes on two cores
    python -m bench --only lab memory
    python -m bench --long --only lab                # with each bench's own defaults
    python -m bench --render                         # run nothing: pages and pictures from the last results

A bench that cannot run on this machine says so in one line; its tables stay as they are.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from bench.lab.hosts import until_terminated
from bench.listed import BENCHES, Bench
from bench.pages import PageError, render
from bench.stamp import ROOT

CANNOT_RUN = 2


def main() -> None:
    """Read the command line, run what is chosen, and render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [bench.name for bench in BENCHES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="BENCH", help=", ".join(names))
    parser.add_argument("--long", action="store_true", help="without the options that make a bench short")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where results are")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where pages are")
    chosen = parser.parse_args()
    benches = [bench for bench in BENCHES if bench.name in chosen.only]
    failed: list[str] = []
    if not chosen.render:
        began = time.monotonic()
        failed = [b.name for b in benches if not _ran(b, chosen.out, () if chosen.long else b.short)]
        print(f"== {len(benches)} benches: {_minutes(time.monotonic() - began)}")
    try:
        nowhere = render(benches, chosen.out, chosen.docs)
    except PageError as error:
        sys.exit(str(error))
    if nowhere:
        print(f"no page of {chosen.docs} has a place for {', '.join(nowhere)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _minutes(seconds: float) -> str:
    """Time for a person.

    Example:
        >>> _minutes(884.6)
        '14 min 45 s'
    """
    return "{} min {} s".format(*divmod(round(seconds), 60))


def _ran(bench: Bench, out: Path, options: tuple[str, ...]) -> bool:
    """Run a bench; tell whether nothing is wrong with it."""
    print(f"== {bench.name} {' '.join(options)}", flush=True)
    began = time.monotonic()
    with until_terminated():
        process = subprocess.Popen([sys.executable, "-m", bench.module, "--out", str(out), *options], cwd=ROOT)
        try:
            code = process.wait()
        finally:
            process.terminate()  # so that it takes away what it has made, if we are ended ourselves
            process.wait()
    print(f"== {bench.name}: {time.monotonic() - began:.0f} s, exit code {code}\n", flush=True)
    return code in (0, CANNOT_RUN)


if __name__ == "__main__":
    main()
