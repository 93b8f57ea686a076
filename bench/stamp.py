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
    common = {"bench": bench, **stamp()}
    path.write_text("".join(json.dumps(_plain({**record, **common})) + "\n" for record in records), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
