"""What a figure was measured on, and the JSON lines and markdown tables that figures are written to."""

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import distopt

ROOT = Path(__file__).parent.parent
_NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
"""By the names that JavaScript has for them."""


def stamp() -> dict[str, Any]:
    """Name the machine and the versions that decide a figure, without naming the host."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "distopt": distopt.__version__,
        "commit": _commit(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of the working tree, with a plus sign if files differ from it; None outside of git."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else None


def write_lines(path: Path, bench: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a record, each with the bench's name and the stamp.

    Args:
        path: the file, overwritten; its folder is made.
        bench: name of the bench.
        records: plain values; a number that is not finite is written as its name, for which JSON has no number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines(bench, records), encoding="utf-8")


def append_lines(path: Path, bench: str, records: Iterable[Mapping[str, Any]]) -> None:
    """As `write_lines`, behind what the file has already: for a bench that can be interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(bench, records))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Give the records that `write_lines` wrote, stamps included; numbers that are not finite are numbers again."""
    return [_numbers(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _lines(bench: str, records: Iterable[Mapping[str, Any]]) -> str:
    common = {"bench": bench, **stamp()}
    return "".join(json.dumps(_plain({**record, **common})) + "\n" for record in records)


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return next(name for name, number in _NOT_FINITE.items() if value == number or name == "NaN")
    return value


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay out a markdown table.

    Example:
        >>> print(markdown(["a", "b"], [[1, 2]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    texts = ["|".join(["", *(str(cell) if row[0] == "---" else f" {cell} " for cell in row), ""]) for row in lines]
    return "\n".join(texts)
