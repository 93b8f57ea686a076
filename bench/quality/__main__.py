"""Does compression cost quality? The same loss at equal steps, and at equal time over networks of three speeds?

    python -m bench.quality                                        # hours on two cores; goes on where it was stopped
    python -m bench.quality --tasks text --seeds 0 --precisions fp32
    python -m bench.quality --tasks dalle --steps 3600 --seeds 0 --ranks 16 --late 4 6 --alternate --halved

Two ranks, processes of one thread each, train the same network from the same weights on the same batches, once for each
way of averaging gradients. Every run is added to ``quality.jsonl`` when it has ended, and one that is there is not made
again: ``--fresh`` begins anew. ``--times`` times steps over networks of three speeds (Linux, as root; see `bench.lab`);
without them only equal steps are compared. Then the tables and the picture are written.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.lab.hosts import HostsError, RankError
from bench.quality.figures import Record
from bench.quality.pictures import draw
from bench.quality.runs import NAME, PRECISIONS, TASKS, cases, missing, run
from bench.quality.tables import tables
from bench.quality.times import timed
from bench.quality.ways import Way, ways_of
from bench.stamp import append_lines, read_lines

__all__ = ["main", "pictures", "tables"]


def main() -> None:
    """Read the command line, make the runs that are missing, and report."""
    chosen = _parser().parse_args()
    torch.set_num_threads(1)  # as each rank has, and the stamp says
    path = chosen.out / f"{NAME}.jsonl"
    if chosen.fresh:
        path.unlink(missing_ok=True)
    ways = ways_of(chosen.ranks, chosen.late, chosen.alternate, chosen.halved, chosen.theirs)
    wanted = cases(chosen.tasks, ways, chosen.precisions, chosen.seeds, chosen.steps)
    for case in missing(wanted, path):
        run(case, path)
    if chosen.times:
        _time(chosen.tasks, ways, chosen.times, path)
    records = read_lines(path)
    found = tables(records)
    (chosen.out / f"{NAME}.md").write_text("\n\n".join(found.values()) + "\n", encoding="utf-8")
    pictures(records, chosen.out)
    print("\n" + "\n\n".join(f"{name}\n\n{text}" for name, text in found.items()))


def pictures(records: Sequence[Record], folder: Path) -> None:
    """Draw what the tables say."""
    draw(folder / f"{NAME}.png", records)


def _time(tasks: Sequence[str], ways: Sequence[Way], rounds: int, path: Path) -> None:
    try:
        append_lines(path, NAME, timed(tasks, ways, rounds))
    except HostsError as error:
        print(f"equal time is left out: {error}", file=sys.stderr)
    except RankError as error:
        sys.exit(str(error))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--ranks", type=_count, nargs="*", default=[1, 2, 4, 8, 16, 32], help="of PowerSGD")
    parser.add_argument(
        "--late", type=_count, nargs="*", default=[4], help="ranks of PowerSGD after a tenth of the steps"
    )
    parser.add_argument(
        "--alternate", type=_count, nargs="*", default=[4], help="ranks of PowerSGD in alternating passes"
    )
    parser.add_argument("--halved", type=_count, nargs="*", default=[8, 16], help="ranks with factors sent in bfloat16")
    parser.add_argument("--theirs", type=_count, nargs="*", default=[4, 16], help="ranks of torch's hook (text)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=_count, help="of every run, in the place of each task's own")
    parser.add_argument("--times", type=_count, metavar="ROUNDS", help="time so many steps of each way")
    parser.add_argument("--fresh", action="store_true", help="forget all runs that the file has")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    return parser


if __name__ == "__main__":
    main()
