"""Is a sharded step slower than torch's own hybrid sharding, and from which network on is it faster?

    python -m bench.sharding                         # about three minutes; Linux, as root
    python -m bench.sharding --limits 1000 100 --rounds 15
    python -m bench.sharding --width 768 --branches 8 --limits 1000

Two nodes of two ranks on one machine: network namespaces, with a link between them of a set rate. A GPT-like network,
28 MiB by default, is trained by `fully_shard` on a mesh of two dimensions, and by `distopt.shard` with several
reducers: one step of each in turn, in the same processes. Writes JSON lines and a table.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.lab.hosts import Link, refusing, run_on_hosts
from bench.lab.ways import NATIVE
from bench.sharding.steps import WAYS, Size, measure
from bench.stamp import markdown, write_lines

UNLIMITED = 0
RANKS_A_NODE = 2


def main() -> None:
    """Read the command line, run everything, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    limits = [UNLIMITED, 1000, 500, 100]
    parser.add_argument("--limits", type=int, nargs="+", default=limits, metavar="MBIT", help="0 for none")
    parser.add_argument("--rounds", type=int, default=Size.rounds, help="measured steps of each way, over each network")
    parser.add_argument("--width", type=int, default=Size.width, help="a multiple of 4")
    parser.add_argument("--branches", type=int, default=Size.branches)
    parser.add_argument("--rows", type=int, default=Size.rows, help="sequences of 64 a rank: more computing")
    parser.add_argument(
        "--ways", type=int, nargs="*", default=range(len(WAYS)), help=f"numbers from 0: {', '.join(WAYS)}"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("device", nargs="?", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.as_rank is not None:
        _rank(chosen)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "records"
        run_on_hosts(["bench.sharding", *sys.argv[1:], "--as-rank", str(found), "--"], ranks=RANKS_A_NODE)
        records = json.loads(found.read_text(encoding="utf-8"))
    write_lines(chosen.out / "sharding.jsonl", "sharding", records)
    text = tables(records)["sharding"]
    (chosen.out / "sharding.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)


def _rank(chosen: argparse.Namespace) -> None:
    """What each of the four processes does; the first one leaves the records."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    size = Size(chosen.width, chosen.branches, chosen.rows, chosen.rounds)
    link = Link(chosen.device, chief=dist.get_rank() % RANKS_A_NODE == 0)
    names = list(WAYS)
    records = measure(link, [limit or None for limit in chosen.limits], [names[i] for i in chosen.ways], size)
    if dist.get_rank() == 0:
        chosen.as_rank.write_text(json.dumps(records), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Medians, their ranges, and what they are beside torch's own."""
    rows: list[list[str]] = []
    for record in records:
        native = next((r for r in records if (r["way"], r["megabits"]) == (NATIVE, record["megabits"])), None)
        seconds = statistics.median(record["seconds"])
        ratios = (
            [own / other for own, other in zip(record["seconds"], native["seconds"], strict=True)] if native else []
        )
        rows.append([
            "no limit" if record["megabits"] is None else f"{record['megabits']} Mbit/s",
            record["way"],
            f"{seconds:.3f}",
            f"{min(record['seconds']):.3f} to {max(record['seconds']):.3f}",
            f"{statistics.median(ratios):.2f}" if ratios else "",
            f"{statistics.median(record['sent']) / 1e6:.2f}",
            f"{statistics.median(record['computing']):.2f}",
            f"{statistics.median(record['reducing']):.2f}",
        ])  # fmt: skip
    head = ["network", "way", "seconds", "range", "beside native", "MB a node sent", "CPU s", "of it reducing"]
    return {"sharding": markdown(head, rows)}


if __name__ == "__main__":
    refusing(main)
