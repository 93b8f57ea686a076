"""One attention layer of DALL-E under each of the paper's masks: all pairs computed and masked, or keys gathered.

    python -m bench.dalle_attention

One thread, processor time, forward and backward, all in turn for some rounds; given are the median and the least.
Where gathering is the faster one, and by how much, decides which way the transformer takes (`sparse_attention.py`).
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from distopt.integrations.dalle.attention import Pattern, attend_densely
from distopt.integrations.dalle.sparse_attention import attend_gathered, keys_per_query

from bench.stamp import markdown, write_lines

SIZES = ((6, 17, 96, 4, 16), (16, 33, 128, 4, 4), (16, 33, 512, 8, 4), (32, 65, 128, 4, 2), (32, 257, 512, 8, 1))
"""Grid, text positions, width, heads, batch."""
KINDS = ("full", "row", "column", "conv")
KERNEL = 11


def main() -> None:
    """Read the command line, measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    records = [record for size in SIZES for record in measured(size, chosen.rounds)]
    write_lines(chosen.out / "dalle_attention.jsonl", "dalle_attention", records)
    table = _table(records)
    (chosen.out / "dalle_attention.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def measured(size: tuple[int, int, int, int, int], rounds: int) -> list[dict[str, Any]]:
    """Time every mask by both ways, in turn; under the full mask there is nothing to gather."""
    grid, text, width, heads, batch = size
    patterns = {kind: Pattern(kind, text, grid, KERNEL) for kind in KINDS}
    ways = {(kind, "dense"): attend_densely for kind in KINDS}
    ways |= {(kind, "gathered"): attend_gathered for kind in KINDS[1:]}
    together = torch.randn(batch, text + grid * grid, 3, heads, width // heads)
    inputs = together.permute(2, 0, 3, 1, 4).requires_grad_()
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for turn in range(rounds + 1):
        for (kind, name), attend in ways.items():
            began = time.process_time()
            attend(*inputs, patterns[kind]).sum().backward()
            if turn:
                seconds[kind, name].append(time.process_time() - began)
    common = dict(zip(("grid", "text", "width", "heads", "batch"), size, strict=True))
    return [
        {
            **common,
            "mask": kind,
            "way": name,
            "keys": keys_per_query(patterns[kind]) / patterns[kind].positions if name == "gathered" else 1.0,
            "rounds": rounds,
            "seconds": statistics.median(times),
            "least_seconds": min(times),
        }
        for (kind, name), times in seconds.items()
    ]


def _table(records: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{r['grid']} x {r['grid']}, {r['text']}, {r['width']}, {r['heads']}, {r['batch']}",
            r["mask"],
            r["way"],
            f"{r['keys']:.0%}",
            f"{1e3 * r['seconds']:.1f} ({1e3 * r['least_seconds']:.1f})",
        ]
        for r in records
    ]
    head = ["grid, text, width, heads, batch", "mask", "way", "keys", "CPU ms, forward and backward (least)"]
    return markdown(head, rows)


if __name__ == "__main__":
    main()
