"""When does one gradient scale lose what a scale for each residual branch keeps?

    python -m bench.scaling                          # a quarter of an hour or more on one core
    python -m bench.scaling --redraw                 # figures and tables of the last run again

Trains a GPT-like network of 24 residual branches on the sources of Python's own library, byte by byte. "On purpose" it
has an early exit whose loss weighs 2^28, so that gradients before and after it are as far apart; "natural" is the same
network without. Ways to scale see the same weights and batches. Products in float16 are emulated
(`distopt.numerics.emulation`). Writes JSON lines, tables and two figures.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.scaling.division import shares_flushed
from bench.scaling.network import EXIT_AFTER, Text
from bench.scaling.pictures import draw
from bench.scaling.training import Size, train
from bench.scaling.ways import Float32, OneScale, PerBranch, Way
from bench.stamp import markdown, write_lines
from distopt.scaling import HeadroomPolicy, PaperPolicy

WORLDS = (1, 64, 1024)
HARDEST = 28

STARTS: dict[str, Way] = {
    "per branch, paper": PerBranch("paper"),
    "per branch, start 2^37": PerBranch(HeadroomPolicy(initial=37.0)),
    "per branch, paper, start 2^37": PerBranch(PaperPolicy(initial=37.0, high=60.0)),
    "per branch, start 2^-10": PerBranch(HeadroomPolicy(initial=-10.0)),
    "per branch, paper, start 2^-10": PerBranch(PaperPolicy(initial=-10.0, low=-40.0)),
}
"""The paper's rule, and starts that do not fit, with bounds that do not forbid what would fit. One seed each."""


def one_scale(exit_octaves: int | None) -> OneScale:
    """A start that fits, and growth that keeps the scale near the top: the best that one scale can do."""
    return OneScale(initial=16.0 - (exit_octaves or 0), interval=50)


def runs(seeds: int) -> Iterator[tuple[int | None, str, Way, int]]:
    """Each run's exit weight, the way's name, the way, and the seed."""
    for exit_octaves, seed in itertools.product((HARDEST, None), range(seeds)):
        yield exit_octaves, "float32", Float32(), seed
        yield exit_octaves, "one scale", one_scale(exit_octaves), seed
        yield exit_octaves, "per branch", PerBranch(), seed
    for exit_octaves in (0, 20, 24):
        yield exit_octaves, "one scale", one_scale(exit_octaves), 0
    yield 24, "float32", Float32(), 0
    yield 24, "per branch", PerBranch(), 0
    yield HARDEST, "one scale, GradScaler's defaults", OneScale(), 0
    for exit_octaves in (HARDEST, None):
        yield from ((exit_octaves, name, way, 0) for name, way in STARTS.items())


def main() -> None:
    """Read the command line, run everything, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=Size.steps)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--branches", type=int, default=Size.branches, help=f"more than {EXIT_AFTER}")
    parser.add_argument("--redraw", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--figures", type=Path, help="where figures go, OUT by default")
    chosen = parser.parse_args()
    lines = chosen.out / "scaling.jsonl"
    if chosen.redraw:
        records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    else:
        torch.set_num_threads(1)
        records = measure(Size(steps=chosen.steps, branches=chosen.branches), chosen.seeds)
        write_lines(lines, "scaling", records)
    figures = chosen.figures or chosen.out
    draw(figures / "scaling.png", records, on_purpose=True)
    draw(figures / "scaling_natural.png", records, on_purpose=False)
    text = "\n\n".join(tables(records))
    (chosen.out / "scaling.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)


def measure(size: Size, seeds: int) -> list[dict[str, Any]]:
    """Do all runs, and the division by the number of ranks."""
    text = Text()
    records: list[dict[str, Any]] = []
    for exit_octaves, name, way, seed in runs(seeds):
        record = train(way, text, size, seed, exit_octaves)
        records.append({"kind": "run", "exit": exit_octaves, "way": name, "seed": seed, **record})
        final = record["validation"][-1][1]
        print(f"exit 2^{exit_octaves}, {name}, seed {seed}: {final:.3f}, {len(record['skipped'])} skipped", flush=True)
    return records + [{"kind": "division", **r} for r in shares_flushed(text, size, WORLDS)]


def tables(records: Sequence[dict[str, Any]]) -> list[str]:
    """Runs, means over their seeds; and the division."""
    rows: list[list[str]] = []
    of = [r for r in records if r["kind"] == "run"]
    for exit_octaves, way in dict.fromkeys((r["exit"], r["way"]) for r in of):
        mine = [r for r in of if (r["exit"], r["way"]) == (exit_octaves, way)]
        rows.append([
            "natural" if exit_octaves is None else f"2^{exit_octaves}",
            way,
            f"{statistics.fmean(r['validation'][-1][1] for r in mine):.3f}",
            ", ".join(f"{r['validation'][-1][1]:.3f}" for r in mine),
            ", ".join(str(len(r["skipped"])) for r in mine),
            _share([z for r in mine for z in r["zeros"][:EXIT_AFTER]]),
            _share([z for r in mine for z in r["zeros"][EXIT_AFTER:]]),
        ])  # fmt: skip
    head = ["exit", "way", "validation loss", "by seed", "steps skipped", "zeros before the exit", "zeros after it"]
    divided = [
        [r["world"], *(f"{100 * r[name]:.3g} %" for name in ("hook", "hook_subnormal", "cast"))]
        for r in records
        if r["kind"] == "division"
    ]
    columns = ["ranks", "zero in `fp16_compress_hook`", "subnormal there", "zero in `Cast(torch.float16)`"]
    return [markdown(head, rows), markdown(columns, divided)]


def _share(zeros: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(zeros):.3g} %" if zeros else "no step"


if __name__ == "__main__":
    main()
