"""The grid of runs: each is one world of real processes, and is written down as soon as it has ended."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.quality import demo, text
from bench.quality.case import WORLD, Case, Outcome
from bench.quality.ways import Way
from bench.stamp import append_lines, read_lines
from tests.processes import run_ranks

NAME = "quality"
TASKS: Mapping[str, Callable[[int, Case], Outcome]] = {"dalle": demo.train, "text": text.train}
THEIRS = ("text",)
"""Where torch's hook can take part: the demo's trainer takes distopt's reducers."""
STEPS: Mapping[str, int] = {"dalle": 300, "text": 400}
"""Unless others are asked for."""
PRECISIONS = ("fp32", "bf16")
_SECONDS_A_STEP = 30.0
"""More than any machine takes: what has not ended by then hangs."""


def cases(
    tasks: Iterable[str], ways: Sequence[Way], precisions: Sequence[str], seeds: Iterable[int], steps: int | None
) -> list[Case]:
    """The grid: all ways of a seed and precision one after another, so that what is there can soon be compared.

    Args:
        tasks: out of `TASKS`.
        ways: to average gradients.
        precisions: out of `PRECISIONS`; the first with all seeds comes before the next.
        seeds: of weights and batches.
        steps: of each run; those of the task if None.
    """
    return [
        Case(task, way, precision, seed, steps or STEPS[task])
        for precision in precisions
        for seed in seeds
        for task in tasks
        for way in ways
        if task in THEIRS or not way.theirs
    ]


def missing(wanted: Iterable[Case], path: Path) -> list[Case]:
    """Those that the file has no record of, each once."""
    there = [record for record in read_lines(path) if record["kind"] == "run"] if path.exists() else []
    return [case for case in dict.fromkeys(wanted) if not any(is_of(record, case) for record in there)]


def is_of(record: Mapping[str, Any], case: Case) -> bool:
    """Whether it is that run's record."""
    return all(record[name] == value for name, value in case.key.items())


def run(case: Case, path: Path) -> dict[str, Any]:
    """Train on all ranks, and add the record to the file.

    Returns:
        The record. ``train`` is the mean over the ranks.
    """
    began = time.monotonic()
    ranks: list[Outcome] = run_ranks(WORLD, TASKS[case.task], case, timeout=60 + _SECONDS_A_STEP * case.steps)
    first = ranks[0]
    losses = [statistics.fmean(step) for step in zip(*(outcome.train for outcome in ranks), strict=True)]
    figures = {"train": losses, "held_out": first.held_out, "saving": first.saving, "skipped": first.skipped}
    record = {"kind": "run", **case.key, **figures}
    append_lines(path, NAME, [record])
    place = f"{case.task}, {case.way.label}, {case.precision}, seed {case.seed}, {case.steps:,} steps"
    print(f"{place}: held-out loss {first.held_out:.4f}; {time.monotonic() - began:.0f} s", flush=True)
    return record
