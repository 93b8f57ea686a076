"""What overlaps in a step? One step of one rank under torch's profiler, drawn as it went.

    python -m bench.overlap                            # half a minute; Linux, as root
    python -m bench.overlap --limit 1000 --rank 64

Two hosts of one rank each, joined by a link of a set rate (`bench.lab.hosts`), train linear maps with PowerSGD. Rank 0
records some steps: backward, compression, decompression, and each bucket's factors on the wire. The shortest one, which
other work of the machine has held up least, is written as JSON lines, a table, and a picture.
"""

import argparse
import collections
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import distopt
from bench.lab.hosts import Link, check, refusing, run_on_hosts
from bench.lab.workloads import Matrices
from bench.stamp import markdown, write_lines

Record = Mapping[str, Any]
WARMUP = 3
"""Steps before, in which DDP lays out its buckets anew."""
ROWS = ("backward", "compress", "P travels", "Q travels", "decompress")
_NAMES = {"distopt::compress": "compress", "distopt::decompress": "decompress", "gloo:all_reduce": "travels"}
_BACKWARD = "autograd::engine::evaluate_function: "
_INK, _FAINT, _RULE, _GREY = "#1f2328", "#656d76", "#d0d7de", "#9aa4af"
_COLOURS = ("#1f78b4", "#f39c12", "#2e8b57", "#d73027", "#542788", "#8c6d31")


def main() -> None:
    """Read the command line, train, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100, metavar="MBIT", help="rate of the link")
    parser.add_argument("--rank", type=int, default=16, help="of PowerSGD's factors")
    parser.add_argument("--samples", type=int, default=64, help="of a batch on each rank")
    parser.add_argument("--steps", type=int, default=5, help="that are recorded")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("device", nargs="?", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if min(chosen.limit, chosen.rank, chosen.samples, chosen.steps) < 1:
        parser.error("--limit, --rank, --samples and --steps are at least 1")
    if chosen.as_rank is not None:
        _rank(chosen)
        return
    check()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "records"
        run_on_hosts(["bench.overlap", *sys.argv[1:], "--as-rank", str(found), "--"])
        records = json.loads(found.read_text(encoding="utf-8"))
    write_lines(chosen.out / "overlap.jsonl", "overlap", records)
    pictures(records, chosen.out)
    print(*tables(records).values(), sep="\n\n")


def _rank(chosen: argparse.Namespace) -> None:
    """What each rank does; the first one leaves the records."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    torch.manual_seed(0)
    model = DistributedDataParallel(Matrices(1448, 12))
    registration = distopt.register(model, distopt.PowerSGD(chosen.rank), check_replicas_every=0, measure_every=0)
    link = Link(chosen.device)
    link.limit(chosen.limit)
    steps: list[list[dict[str, Any]]] = []
    for step in range(WARMUP + chosen.steps):
        loss = model(torch.randn(chosen.samples, 1448))
        dist.barrier()
        with _profiler() as profiler:
            loss.backward()
            registration.stats()
        if step >= WARMUP:
            steps.append(spans(_events(profiler), len(registration._attachment.layout())))
    if dist.get_rank() == 0:
        shortest = min(steps, key=lambda step: max(span["end"] for span in step))
        records = [{"megabits": chosen.limit, "rank": chosen.rank, **span} for span in shortest]
        chosen.as_rank.write_text(json.dumps(records), encoding="utf-8")
    dist.barrier()
    link.limit(None)
    dist.destroy_process_group()


def _profiler() -> profile:
    everything = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    return profile(activities=[ProfilerActivity.CPU], experimental_config=everything)


def _events(profiler: profile) -> list[tuple[str, float, float]]:
    """Names, beginnings and ends of what the profiler saw, in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    return [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in trace["traceEvents"] if e.get("ph") == "X"]


def spans(events: Iterable[tuple[str, float, float]], buckets: int) -> list[dict[str, Any]]:
    """Sort the events of a step into rows, and say which bucket each belongs to.

    Args:
        events: names, beginnings and ends in microseconds.
        buckets: of the step, with two rounds each.

    Returns:
        ``row`` out of `ROWS`, ``bucket`` and ``factor`` (-1 and empty for what is of no bucket), ``begin`` and ``end``
        in milliseconds from the beginning of backward.
    """
    ordered = sorted(events, key=lambda event: event[1])
    kinds = [("backward" if n.startswith(_BACKWARD) else _NAMES.get(n, ""), b, e) for n, b, e in ordered]
    zero = next(begin for kind, begin, _ in kinds if kind == "backward")
    places = {"compress": iter(turns(buckets)), "travels": iter([t for t in turns(buckets) if t[1]])}
    found: list[dict[str, Any]] = []
    for kind, begin, end in kinds:
        if kind:
            bucket, factor = next(places[kind]) if kind in places else (-1, "")
            row = f"{factor} travels" if kind == "travels" else kind
            times = {"begin": (begin - zero) / 1e3, "end": (end - zero) / 1e3}
            found.append({"row": row, "bucket": bucket, "factor": factor, **times})
    return found


def turns(buckets: int) -> list[tuple[int, str]]:
    """What a step computes one after another: the factors of a bucket, and nothing more when both are averaged.

    Example:
        >>> turns(2)
        [(0, 'P'), (1, 'P'), (0, 'Q'), (1, 'Q'), (0, ''), (1, '')]
    """
    following = {"P": "Q", "Q": ""}
    waiting: collections.deque[tuple[int, str]] = collections.deque()
    order: list[tuple[int, str]] = []

    def land() -> None:
        bucket, factor = waiting.popleft()
        order.append((bucket, following[factor]))
        if following[factor]:
            waiting.append(order[-1])

    for bucket in range(buckets):
        earlier = len(waiting)
        order.append((bucket, "P"))
        waiting.append(order[-1])
        for _ in range(earlier):
            land()
    while waiting:
        land()
    return order


def tables(records: Sequence[Record]) -> dict[str, str]:
    """The table in markdown, by its mark in docs/benchmarks.md."""
    computing = _union(r for r in records if not r["row"].endswith("travels"))
    travelling = _union(r for r in records if r["row"].endswith("travels"))
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in computing for b in travelling)
    rows = [[f"{r}, all in all", f"{_length(_union(x for x in records if x['row'] == r)):.0f} ms"] for r in ROWS]
    rows.append(["factors travel", f"{_length(travelling):.0f} ms"])
    rows.append(["of these, while this rank computes", f"{both:.0f} ms"])
    rows.append(["from the beginning of backward to the end of the step", f"{max(r['end'] for r in records):.0f} ms"])
    return {"overlap": markdown(["One step of rank 0", ""], rows)}


def pictures(records: Sequence[Record], folder: Path) -> None:
    """Draw the step as it went."""
    # A figure of its own, without pyplot: drawing must not depend on what display there is, or change global state.
    figure = Figure(figsize=(11, 3.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    first = records[0]
    setting = f"PowerSGD rank {first['rank']}, over {first['megabits']} Mbit/s"
    title = f"One step of rank 0 of two, {setting} (a colour a bucket; pale: its end, with nothing more to send)"
    figure.suptitle(title, x=0.012, ha="left", fontsize=10, fontweight="bold", color=_INK)
    axes = figure.subplots()
    end = max(r["end"] for r in records)
    for record in records:
        _bar(axes, record, end)
    axes.set_yticks(range(len(ROWS)), ROWS, fontsize=9)
    axes.set_ylim(len(ROWS) - 0.5, -0.5)
    axes.set_xlim(0, end * 1.01)
    axes.set_xlabel("milliseconds from the beginning of backward", fontsize=9, color=_INK)
    axes.grid(axis="x", color=_RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=_FAINT)
    figure.savefig(folder / "overlap.png")


def _bar(axes: Axes, record: Record, end: float) -> None:
    row, width = ROWS.index(record["row"]), record["end"] - record["begin"]
    colour = _COLOURS[record["bucket"] % len(_COLOURS)] if record["bucket"] >= 0 else _GREY
    height, middle = 0.72, float(row)
    if record["row"].endswith("travels"):  # two may be under way at once: each bucket in turn takes half of the row
        height, middle = 0.36, row + (0.18 if record["bucket"] % 2 else -0.18)
    alpha = 1.0 if record["factor"] else 0.55
    axes.barh(middle, width, left=record["begin"], height=height, color=colour, alpha=alpha)
    if record["factor"] and width > 0.022 * end:
        text = f"{record['factor']}{record['bucket']}"
        axes.text(record["begin"] + width / 2, middle, text, ha="center", va="center", fontsize=7.5, color="white")


def _union(records: Iterable[Record]) -> list[tuple[float, float]]:
    """The times in which anything goes on, one after another."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted((r["begin"], r["end"]) for r in records):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def _length(times: Iterable[tuple[float, float]]) -> float:
    return sum(end - begin for begin, end in times)


if __name__ == "__main__":
    refusing(main)
