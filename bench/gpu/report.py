"""Tables of what was measured on a GPU, by their marks in docs/benchmarks.md; what was to be reached comes first."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.gpu.parts import FIVE
from bench.gpu.ways import BATCHED, DION, EPFML, OURS, TORCH
from bench.stamp import markdown

Record = Mapping[str, Any]
Cell = tuple[str, str, int]

OF_FLOOR, OF_TORCH, OF_PEERS, OF_QR, OF_ADAMW, IDENTITY = 1.3, 4.0, 2.0, 10.0, 1.5, 1e-6
"""What is to be reached."""
ON_SHAPE = (64, 4096, 32)


def tables(records: Sequence[Record]) -> dict[str, str]:
    """All tables that there is anything for."""
    of = {part: [r for r in records if r.get("part") == part] for part in {r.get("part") for r in records}}
    shown = {
        "gpu-targets": lambda: _targets(of),
        "gpu-floors": lambda: _floors(of["floors"]),
        "gpu-compression": lambda: _compression(of["compression"], rates(of.get("floors", []))),
        "gpu-streams": lambda: _streams(of["streams"]),
        "gpu-launches": lambda: _launches(of["launches"]),
        "gpu-orthogonal": lambda: _orthogonal(of["orthogonal"]),
        "gpu-optimizer": lambda: _optimizer(of["optimizer"]),
        "gpu-scaler": lambda: _scaler(of["scaler"], rates(of.get("floors", []))),
        "gpu-dalle": lambda: _dalle(of["dalle"]),
    }
    needed = {"gpu-targets": "compression"}
    found = {mark: make() for mark, make in shown.items() if needed.get(mark, mark.removeprefix("gpu-")) in of}
    gpu = next((r["gpu"] for r in records if r.get("gpu")), None)
    return {mark: f"{table}\n\n{gpu}" if gpu else table for mark, table in found.items()}


def rates(records: Iterable[Record]) -> dict[str, float]:
    """Bytes a second that are copied, and operations a second by precision.

    Products of float32 may be made of three of tf32.
    """
    found = {r["floor"]: r["per_second"] for r in records if "floor" in r}
    if "tf32" in found:
        found["float32"] = max(found.get("float32", 0.0), found["tf32"] / 3)
    return found


def floor_ms(record: Record, rate: Mapping[str, float]) -> float | None:
    """The least that a step of compression can take: five passes over the gradient, or its products."""
    if "copy" not in rate or record["dtype"] not in rate:
        return None
    return 1e3 * max(FIVE * record["bytes"] / rate["copy"], record["operations"] / rate[record["dtype"]])


def _targets(of: Mapping[str, Sequence[Record]]) -> str:
    rate = rates(of.get("floors", []))
    compressed = of.get("compression", [])
    cells = _cells(compressed)
    rows = [_row(f"compression within {OF_FLOOR} x of its floor", _of_floor(cells, rate), OF_FLOOR, most=True)]
    theirs = {
        "torch's hook": (OF_TORCH, (TORCH, BATCHED)),
        "epfml's": (OF_PEERS, (EPFML,)),
        "Dion's": (OF_PEERS, (DION,)),
    }
    for name, (least, ways) in theirs.items():
        rows.append(_row(f"compression at least {least:g} x faster than {name}", _ratios(cells, ways), least))
    stacks: dict[tuple[int, int, int], dict[str, Record]] = {}
    for r in of.get("orthogonal", []):
        if "way" in r:
            stacks.setdefault((r["count"], r["rows"], r["rank"]), {})[r["way"]] = r
    faster = {s: q["torch.linalg.qr"]["ms"] / q[OURS]["ms"] for s, q in stacks.items() if _both(q, "torch.linalg.qr")}
    errors = {s: q[OURS]["error_of_identity"] for s, q in stacks.items() if "error_of_identity" in q.get(OURS, {})}
    on = {s: ratio for s, ratio in faster.items() if s == ON_SHAPE}
    rows.append(
        _row(f"orthogonalisation of 64 of 4096 x 32 at least {OF_QR:g} x faster than torch.linalg.qr", on, OF_QR)
    )
    rows.append(_row("orthogonalisation never slower than torch's QR", faster, 1.0))
    rows.append(_row(f"orthogonalisation: elements of QᵀQ right to {IDENTITY:g}", errors, IDENTITY, most=True))
    adamw = {r["way"]: r["ms"] for r in of.get("optimizer", []) if "ms" in r}
    fused = adamw.get("torch fused float32")
    faster = {way: fused / adamw[way] for way in ("distopt bfloat16", "distopt packed16") if fused and way in adamw}
    rows.append(_row(f"AdamW of 16-bit moments at least {OF_ADAMW:g} x faster than torch's fused", faster, OF_ADAMW))
    checks = [r for r in of.get("checks", []) if "passed" in r]
    failing = [f"{r['file']}: {r['said']}" for r in checks if not r["passed"]]
    said = "; ".join(failing) or (f"{len(checks)} files of tests pass" if checks else "not run")
    rows.append(["checks on the device", said, "", "not met" if failing else "met" if checks else "open"])
    return markdown(["to be reached", "worst", "where", ""], rows)


def _row(what: str, found: Mapping[Any, float], bound: float, *, most: bool = False) -> list[str]:
    if not found:
        return [what, "not measured", "", "open"]
    worst = (max if most else min)(found, key=lambda key: found[key])
    met = found[worst] <= bound if most else found[worst] >= bound
    where = worst if isinstance(worst, str) else " ".join(map(str, worst))
    return [what, f"{found[worst]:.3g}", where, "met" if met else "not met"]


def _cells(records: Iterable[Record]) -> dict[Cell, dict[str, Record]]:
    cells: dict[Cell, dict[str, Record]] = {}
    for r in records:
        if "way" in r:
            cells.setdefault((r["model"], r["dtype"], r["rank"]), {})[r["way"]] = r
    return cells


def _of_floor(cells: Mapping[Cell, Mapping[str, Record]], rate: Mapping[str, float]) -> dict[Cell, float]:
    found: dict[Cell, float] = {}
    for cell, ways in cells.items():
        least = floor_ms(ways[OURS], rate) if "ms" in ways.get(OURS, {}) else None
        if least:
            found[cell] = ways[OURS]["ms"] / least
    return found


def _ratios(cells: Mapping[Cell, Mapping[str, Record]], theirs: Sequence[str]) -> dict[Cell, float]:
    """How often ours is faster than the fastest of theirs."""
    found: dict[Cell, float] = {}
    for cell, ways in cells.items():
        times = [ways[way]["ms"] for way in theirs if "ms" in ways.get(way, {})]
        if times and "ms" in ways.get(OURS, {}):
            found[cell] = min(times) / ways[OURS]["ms"]
    return found


def _both(ways: Mapping[str, Record], other: str) -> bool:
    return all("ms" in ways.get(way, {}) for way in (OURS, other))


def _floors(records: Sequence[Record]) -> str:
    rows = [
        [r["floor"], f"{r['per_second'] / 1e12:.2f} {'TB/s' if r['floor'] == 'copy' else 'TFLOP/s'}", _spread(r)]
        for r in records
        if "floor" in r
    ]
    return markdown(["floor", "", "ms (quartiles)"], rows)


def _compression(records: Sequence[Record], rate: Mapping[str, float]) -> str:
    rows: list[list[str]] = []
    for (model, dtype, rank), ways in _cells(records).items():
        for way, r in ways.items():
            least = floor_ms(r, rate)
            if "ms" not in r:
                rows.append([model, dtype, str(rank), way, r.get("missing") or r.get("error", ""), "", "", ""])
                continue
            of_floor = f"{r['ms'] / least:.2f}" if least else ""
            ours = ways.get(OURS, {}).get("ms")
            memory = f"{r['peak_bytes'] / 1e9:.2f}" if r.get("peak_bytes") is not None else ""
            rows.append(
                [model, dtype, str(rank), way, _spread(r), of_floor, f"{r['ms'] / ours:.2f}" if ours else "", memory]
            )
    head = ["model", "dtype", "rank", "way", "ms (quartiles)", "of the floor", "of distopt", "peak, GB beyond"]
    return markdown(head, rows)


def _streams(records: Sequence[Record]) -> str:
    rows: list[list[str]] = []
    names = ("backward", "ours", "meanwhile", "at_once", "waits_of_backward", "waits")
    for r in records:
        if "who" in r:
            found = [str(r[name]) for name in names] if "ours" in r else [r["error"], *[""] * (len(names) - 1)]
            rows.append([r["who"], f"{r['ranks']} over {r['backend']}", *found])
    head = [
        "one backward pass",
        "ranks",
        "its kernels",
        "the hook's",
        "of backward's, enqueued meanwhile",
        "pairs at once",
    ]
    return markdown([*head, "waits of backward's thread meanwhile", "waits of others"], rows)


def _launches(records: Sequence[Record]) -> str:
    rows = [
        [r["model"], r["rank"], r["way"], r["launches"], r["copies"], r["waits"]] for r in records if "launches" in r
    ]
    return markdown(["one bucket", "rank", "way", "kernels launched", "copies and fills", "waits of the host"], rows)


def _orthogonal(records: Sequence[Record]) -> str:
    rows: list[list[str]] = []
    qr = {_stack(r): r["ms"] for r in records if r.get("way") == "torch.linalg.qr" and "ms" in r}
    for r in records:
        if "ms" in r:
            other = qr.get(_stack(r))
            ratio = f"{other / r['ms']:.1f}" if other else ""
            rows.append([_stack(r), r["way"], _spread(r), ratio, f"{r['error_of_identity']:.1e}"])
        elif "error" in r:
            rows.append([_stack(r), r["way"], r["error"], "", ""])
    return markdown(["matrices", "way", "ms (quartiles)", "x faster than torch's QR", "error of QᵀQ"], rows)


def _stack(r: Record) -> str:
    return f"{r['count']} of {r['rows']} x {r['rank']}"


def _optimizer(records: Sequence[Record]) -> str:
    fused = next((r["ms"] for r in records if r.get("way") == "torch fused float32" and "ms" in r), None)
    rows = [
        [r["way"], r.get("error") or _spread(r), f"{fused / r['ms']:.2f}" if fused and "ms" in r else ""]
        for r in records
        if "way" in r
    ]
    return markdown(["AdamW", "ms (quartiles)", "x faster than torch fused"], rows)


def _scaler(records: Sequence[Record], rate: Mapping[str, float]) -> str:
    rows: list[list[str]] = []
    for r in records:
        if "case" in r:
            least = 1e3 * r["bytes"] / rate["copy"] if "copy" in rate else None
            of_floor = f"{r['ms'] / least:.2f}" if least and "ms" in r else ""
            rows.append([r["case"], r["way"], r.get("error") or _spread(r), of_floor])
    return markdown(["backward", "way", "ms (quartiles)", "of the floor"], rows)


def _dalle(records: Sequence[Record]) -> str:
    rows: list[list[str]] = []
    for r in records:
        if "tokens_per_second" in r:
            memory = f"{r['peak_bytes'] / 1e9:.2f}" if r["peak_bytes"] else ""
            rows.append([r["precision"], f"{r['tokens_per_second']:.0f}", memory])
        elif "precision" in r:
            rows.append([r["precision"], r["error"], ""])
    said = [r["demo"] for r in records if "demo" in r]
    return "\n\n".join([markdown(["precision", "tokens a second", "peak memory, GB"], rows), *said])


def _spread(r: Record) -> str:
    return f"{r['ms']:.3g} ({r['low']:.3g} to {r['high']:.3g})"
