"""What does a training step cost over networks of several speeds, and how close is that to what the wire allows?

    python -m bench.lab                                # half an hour; Linux, as root
    python -m bench.lab --workloads matrices --rounds 5 --layouts replicated
    python -m bench.lab --hosts 3 --limits 100 --layouts replicated

Hosts on one machine, with links of a set rate between them (`bench.lab.hosts`): two of one rank, each with a whole
model ("replicated"), and two of two ranks that share the parameters of a node ("sharded"). All ways of averaging
gradients take one step in turn, in the same processes, and so on for some rounds. Compression alone is the same step
with every rank by itself. Writes JSON lines and tables, and tells which targets are met.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from bench.lab.figures import Record
from bench.lab.hosts import Link, check, refusing, run_on_hosts
from bench.lab.job import Job
from bench.lab.pictures import draw
from bench.lab.tables import step_tables, target_table
from bench.lab.targets import targets
from bench.lab.ways import REPLICATED, SHARDED
from bench.lab.workloads import WORKLOADS
from bench.stamp import write_lines

UNLIMITED = 0
RANKS_A_HOST = {"replicated": 1, "sharded": 2}
"""By the layout."""


def main() -> None:
    """Read the command line, run everything, and report."""
    chosen = _parser().parse_args()
    if chosen.as_rank is not None:
        _rank(chosen)
        return
    check()
    records: list[Record] = []
    for layout in chosen.layouts:
        for workload in chosen.workloads:
            records += _measured(chosen, layout, workload)
            write_lines(chosen.out / "lab.jsonl", "lab", records)
    found = tables(records)
    (chosen.out / "lab.md").write_text("\n\n".join(found.values()) + "\n", encoding="utf-8")
    pictures(records, chosen.out)
    print("\n" + "\n\n".join(f"{name}\n\n{text}" for name, text in found.items()) + "\n")
    print(*(target.line() for target in targets(records)), sep="\n")


def tables(records: Sequence[Record]) -> dict[str, str]:
    """Tables in markdown, and the picture's place, by their marks in docs/benchmarks.md."""
    drawn = any(r["layout"] == "replicated" for r in records)
    picture = {"lab-picture": "![Steps of all ways over all networks](lab.png)"} if drawn else {}
    return {**picture, **step_tables(records), "lab-targets": target_table(targets(records))}


def pictures(records: Sequence[Record], folder: Path) -> None:
    """Draw what the tables say of replicated models."""
    draw(folder / "lab.png", records)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    limits = [UNLIMITED, 1000, 100]
    parser.add_argument("--limits", type=int, nargs="+", default=limits, metavar="MBIT", help="0 for none")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--layouts", nargs="+", choices=RANKS_A_HOST, default=list(RANKS_A_HOST))
    parser.add_argument("--rounds", type=int, default=9, help="measured steps of each way, over each network")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=(*REPLICATED, *SHARDED), metavar="WAY", help="by their labels")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--as-rank", nargs=3, metavar=("FILE", "LAYOUT", "WORKLOAD"), help=argparse.SUPPRESS)
    parser.add_argument("device", nargs="?", help=argparse.SUPPRESS)
    return parser


def _measured(chosen: argparse.Namespace, layout: str, workload: str) -> list[Record]:
    """Start the ranks, and read what the first one leaves."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "records"
        arguments = [*sys.argv[1:], "--as-rank", str(found), layout, workload, "--"]
        run_on_hosts(["bench.lab", *arguments], count=chosen.hosts, ranks=RANKS_A_HOST[layout])
        records: list[Record] = json.loads(found.read_text(encoding="utf-8"))
    rows = records[0]["rows"]
    print(f"{layout}, {WORKLOADS[workload].title}, {rows} rows a rank: done", flush=True)
    return records


def _rank(chosen: argparse.Namespace) -> None:
    """What each of the processes does; the first one leaves the records."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    file, layout, name = chosen.as_rank
    link = Link(chosen.device, chief=dist.get_rank() % RANKS_A_HOST[layout] == 0)
    limits = [limit or None for limit in chosen.limits]
    job = Job(name, layout, chosen.rounds, chosen.ways or (*REPLICATED, *SHARDED))
    records = job.run(link, limits)
    if layout == "replicated":
        records += job.run(link, [None], alone=True)
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(records), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    refusing(main)
