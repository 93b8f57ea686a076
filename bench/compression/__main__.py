"""What compressing gradients costs a processor, beside torch's hook and the package of PowerSGD's author.

    python -m bench.compression
    python -m bench.compression --models gpt2 --ranks 4 --rounds 20

One process, one thread, a group of one rank whose collectives cost nothing: what is left is the work. All gradients of
a model lie in one bucket, and every way of compressing them takes one step in turn, for many rounds. Given are medians
with quartiles of the processor time, of its ratio to torch's hook in the same round, and how fast the gradient's memory
is gone through: five times its bytes (the least that PowerSGD with error feedback can read and write; four times where
one factor travels a step), as a fraction of what copying an array takes on the same machine in the same run.

- ``both`` and ``alternate``: `distopt.PowerSGD`, driven as a trainer's step drives it, its checks included;
- ``products``: only the matrix products of ``both``, as if all else were free;
- ``torch`` and ``torch batched``: ``powerSGD_hook``, its futures complete at once; the latter with
  ``batch_tensors_with_same_shape``;
- ``epfml``: the package ``powersgd``, where it is installed (`bench.epfml` says how); float32 only.

All are given the same matrices, embeddings included, and leave vectors whole. Matrices are as wide as each sees fit:
a convolution's is the one nearest to square for us, and one row an output channel for the others.

A second table gives the overhead: the time of a bucket that holds one tiny matrix, or ten equal ones, at rank 1, and
what the same tensor operations take by themselves, without what calls for them.
"""

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from bench import epfml
from bench.compression.models import MODELS, TINY, Shapes
from bench.compression.replay import operations
from bench.compression.ways import WAYS
from bench.memory import Done
from bench.stamp import markdown, write_lines

BASELINE = "torch"
SKIPPED = 3
"""Rounds that are not counted: the first make what is kept from step to step."""
PASSES = {"alternate": 4}
"""Times that the gradient's bytes must be read or written at least; 5 where nothing else is said."""
TINY_ROUNDS = 300


def main() -> None:
    """Read the command line, measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 4, 32])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    copied = copy_rate()
    records: list[dict[str, Any]] = []
    for count, shapes in TINY.items():
        new = measured(f"tiny {count}", shapes(), torch.float32, 1, chosen.ways, TINY_ROUNDS, copied)
        records += [r | repeated(r["way"], shapes()) for r in new]
    for model in chosen.models:
        for dtype in chosen.dtypes:
            for rank in chosen.ranks:
                new = measured(model, MODELS[model](), getattr(torch, dtype), rank, chosen.ways, chosen.rounds, copied)
                records += new
                print(tables(new)["compression"], flush=True)
    write_lines(chosen.out / "compression.jsonl", "compression", records)
    text = "\n\n".join(tables(records).values())
    (chosen.out / "compression.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)


def measured(
    model: str, shapes: Shapes, dtype: torch.dtype, rank: int, ways: Sequence[str], rounds: int, copied: float
) -> list[dict[str, Any]]:
    """Time a step of every way of compressing one model's gradients, in turn."""
    generator = torch.Generator().manual_seed(0)
    fed = torch.randn(sum(map(math.prod, shapes)), generator=generator).to(dtype)
    bucket = torch.empty_like(fed)
    steps = {
        way: WAYS[way](shapes, bucket, rank)
        for way in ways
        if way != "epfml" or (epfml.is_installed() and dtype == torch.float32)
    }
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    with mock.patch.object(dist, "all_reduce", Done), torch.no_grad():
        for turn in range(rounds + SKIPPED):
            for way, step in steps.items():
                bucket.copy_(fed)
                began = time.process_time()
                step()
                if turn >= SKIPPED:
                    seconds[way].append(time.process_time() - began)
    nbytes = fed.numel() * fed.element_size()
    settings = {"model": model, "dtype": str(dtype).removeprefix("torch."), "rank": rank, "rounds": rounds}
    return [
        {**settings, "way": way, **summary(way, times, seconds.get(BASELINE, times), nbytes, copied)}
        for way, times in seconds.items()
    ]


def repeated(way: str, shapes: Shapes) -> dict[str, float]:
    """How many tensor operations a step of a tiny bucket has, the time they take by themselves, and that beyond it."""
    with mock.patch.object(dist, "all_reduce", Done), torch.no_grad():
        step = WAYS[way](shapes, torch.randn(sum(map(math.prod, shapes))), 1)
        for _ in range(SKIPPED):
            step()
        again, count = operations(step)
        seconds: list[tuple[float, float]] = []
        for _ in range(TINY_ROUNDS):
            times = [time.process_time()]
            for act in (step, again):
                act()
                times.append(time.process_time())
            seconds.append((times[1] - times[0], times[2] - times[1]))
    alone = statistics.median(seconds_again for _, seconds_again in seconds)
    beyond = statistics.median(whole - part for whole, part in seconds)
    return {"operations": count, "operations_ms": alone * 1e3, "python_ms": beyond * 1e3}


def summary(way: str, times: list[float], baseline: list[float], nbytes: int, copied: float) -> dict[str, float]:
    """Medians and quartiles of one way of compressing."""
    low, middle, high = statistics.quantiles(times, n=4)
    ratios = statistics.quantiles((mine / theirs for mine, theirs in zip(times, baseline, strict=True)), n=4)
    rate = PASSES.get(way, 5) * nbytes / middle / 1e9
    return {
        "bytes": nbytes,
        "ms": middle * 1e3,
        "ms_low": low * 1e3,
        "ms_high": high * 1e3,
        "ratio": ratios[1],
        "ratio_low": ratios[0],
        "ratio_high": ratios[2],
        "gigabytes_per_second": rate,
        "of_copy": rate / copied,
        "copy_gigabytes_per_second": copied,
    }


def copy_rate() -> float:
    """Gigabytes that copying an array reads and writes in a second: the best of some, as STREAM takes it."""
    source = torch.ones(2**25)
    target = torch.empty_like(source)
    seconds: list[float] = []
    for _ in range(12):
        began = time.process_time()
        target.copy_(source)
        seconds.append(time.process_time() - began)
    return 2 * source.numel() * source.element_size() / min(seconds) / 1e9


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The figures as tables, by their marks."""
    tiny = [r for r in records if r["model"].startswith("tiny ")]
    found = {"compression-overhead": _overhead(tiny)} if tiny else {}
    models = [r for r in records if r not in tiny]
    return {**({"compression": _compression(models)} if models else {}), **found}


def _compression(records: Sequence[Mapping[str, Any]]) -> str:
    """A row a way, three columns a rank."""
    ranks = sorted({r["rank"] for r in records})
    found = {(r["model"], r["dtype"], r["way"], r["rank"]): r for r in records}
    rows: list[list[str]] = []
    for key in dict.fromkeys(key[:3] for key in found):
        cells = (_cells(found.get((*key, rank))) for rank in ranks)
        rows.append([*key, *(cell for of_rank in cells for cell in of_rank)])
    head = ["model", "dtype", "way"]
    for rank in ranks:
        head += [f"rank {rank}: ms", "of torch's hook (quartiles)", "of a copy"]
    return markdown(head, rows)


def _cells(record: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if record is None:
        return "", "", ""
    return f"{record['ms']:.1f}", _ratio(record), f"{record['of_copy']:.2f}"


def _overhead(records: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            r["model"].removeprefix("tiny "),
            r["way"],
            f"{1e3 * r['ms']:.0f} ({1e3 * r['ms_low']:.0f} to {1e3 * r['ms_high']:.0f})",
            f"{r['operations']}",
            f"{1e3 * r['operations_ms']:.0f}",
            f"{1e3 * r['python_ms']:.0f}",
            _ratio(r),
        ]
        for r in records
    ]
    head = ["matrices of 8 x 8", "way", "µs a bucket (quartiles)", "tensor operations", "µs of these", "µs of Python"]
    return markdown([*head, "of torch's hook (quartiles)"], rows)


def _ratio(record: Mapping[str, Any]) -> str:
    return f"{record['ratio']:.2f} ({record['ratio_low']:.2f} to {record['ratio_high']:.2f})"


if __name__ == "__main__":
    main()
