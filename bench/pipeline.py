"""How long the ranks of a pipeline wait, beside the formulas.

    python -m bench.pipeline

Blocks do nothing but sleep, twice as long in backward as in forward: so ranks do not compete for processor cores, and
what is measured is the schedule, with what sending, gathering and torch's own bookkeeping add. There are eight blocks,
whatever the number of ranks; interleaved, they make twice as many stages.

A rank's idle share is the part of a step that it spends outside of its forwards and backwards, from the first of any
rank to the last. Given are the mean over ranks, and the ranks' range, of the shortest step, which other processes
disturbed the least.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distopt
from bench.stamp import markdown, write_lines
from distopt.pipelining.schedules import Action, ScheduleName, bubble_share
from tests.processes import run_ranks

BLOCKS = 8
SCHEDULES: dict[ScheduleName, int] = {"gpipe": 1, "1f1b": 1, "interleaved": 2}
"""Stages of a rank."""


class _Sleep(torch.autograd.Function):
    """The identity, which takes its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        time.sleep(2 * ctx.seconds)
        return gradient, None


class Sleeper(nn.Module):
    """A block that uses no processor.

    Args:
        seconds: of forward; backward takes twice as long.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Scale, and sleep."""
        return _Sleep.apply(x * self.weight, self.seconds)


def main() -> None:
    """Read the command line, measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--milliseconds", type=float, default=20.0, help="forward of a block")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    records = [
        record
        for ranks in chosen.ranks
        for record in measured(ranks, chosen.microbatches, chosen.steps, chosen.milliseconds / 1000)
    ]
    write_lines(chosen.out / "pipeline.jsonl", "pipeline", records)
    text = table(records) + "\n"
    (chosen.out / "pipeline.md").write_text(text, encoding="utf-8")
    print(text)


def measured(ranks: int, microbatches: Sequence[int], steps: int, seconds: float) -> list[dict[str, Any]]:
    """Idle shares of every schedule on so many ranks."""
    records: list[dict[str, Any]] = []
    for schedule, each in SCHEDULES.items():
        for count in microbatches:
            found = run_ranks(ranks, job, schedule, each * ranks, count, steps, seconds, timeout=600.0)
            shortest = min(zip(*found, strict=True), key=span)
            shares = shares_of(shortest)
            records.append(
                {
                    "schedule": schedule,
                    "ranks": ranks,
                    "stages": each * ranks,
                    "microbatches": count,
                    "steps": steps,
                    "forward_seconds": seconds,
                    "step_seconds": span(shortest),
                    "formula": bubble_share(schedule, ranks, each * ranks, count),
                    "idle": statistics.mean(shares),
                    "idle_by_rank": shares,
                }
            )
    return records


def job(
    rank: int, schedule: ScheduleName, stages: int, microbatches: int, steps: int, seconds: float
) -> list[list[Action]]:
    """What this rank did in each step, after one that prepares."""
    blocks = [Sleeper(seconds) for _ in range(BLOCKS)]
    pipe = distopt.pipeline(
        blocks, stages=stages, schedule=schedule, microbatches=microbatches, loss_fn=nn.functional.mse_loss
    )
    x = torch.ones(microbatches, 4)
    found: list[list[Action]] = []
    for _ in range(1 + steps):
        dist.barrier()
        pipe.step(x, target=x)
        found.append(pipe.actions())
    return found[1:]


def span(step: Sequence[Sequence[Action]]) -> float:
    """Seconds from the first action to the last; all clocks are one machine's."""
    return max(action.end for row in step for action in row) - min(action.begin for row in step for action in row)


def shares_of(step: Sequence[Sequence[Action]]) -> list[float]:
    """Share of a step that each rank was idle."""
    return [1 - sum(action.end - action.begin for action in row) / span(step) for row in step]


def table(records: Sequence[dict[str, Any]]) -> str:
    """Formula beside measurement."""
    head = ["schedule", "ranks", "stages", "micro-batches", "formula", "measured", "ranks from - to"]
    rows = [
        [
            record["schedule"],
            record["ranks"],
            record["stages"],
            record["microbatches"],
            f"{record['formula']:.1%}",
            f"{record['idle']:.1%}",
            f"{min(record['idle_by_rank']):.1%} - {max(record['idle_by_rank']):.1%}",
        ]
        for record in records
    ]
    return markdown(head, rows)


if __name__ == "__main__":
    main()
