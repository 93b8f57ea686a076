"""How well does a nearly low-rank 16-bit gradient arrive, and how well could it?

    python -m bench.low_rank_error                   # some minutes: bfloat16 products are slow on most CPUs

One rank feeds a 4096 x 1024 gradient that is of rank two but for 1 % of noise, the same signal at every step and fresh
noise. Prints the relative error of what is delivered: at the first compressed step, which starts from a random factor,
the largest of all steps, and at the last. The floor is the best approximation of that rank: the truncated SVD, in
float64.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from bench.competitors import Competitor, Distopt, Torch
from bench.stamp import markdown, write_lines
from bench.workload import Given, delivered
from tests.processes import run_ranks

SHAPE = (4096, 1024)
START = 2
COMPETITORS: list[Competitor] = [Distopt(), Torch()]
"""One line each; further settings of a reducer go into ``Distopt("its label", {"setting": value})``."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def gradient(step: int, dtype: torch.dtype, shape: tuple[int, int] = SHAPE) -> Tensor:
    """A signal of rank two that stays, and noise of 1 % of its norm that does not."""
    signal, fresh = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + step)
    left, right = torch.randn(shape[0], 2, generator=signal), torch.randn(2, shape[1], generator=signal)
    low_rank, noise = left @ right, torch.randn(*shape, generator=fresh)
    return (low_rank + 0.01 * noise * (low_rank.norm() / noise.norm())).to(dtype)


def main() -> None:
    """Read the command line, run every competitor at every rank, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 32, 128], help="ranks of PowerSGD")
    parser.add_argument("--dtypes", nargs="*", choices=list(DTYPES), default=["bfloat16"])
    parser.add_argument("--steps", type=int, default=6, help="compressed steps")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one run")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    records: list[dict[str, Any]] = []
    for dtype in chosen.dtypes:
        floors = floor(gradient(START, DTYPES[dtype]), chosen.ranks)
        for columns in chosen.ranks:
            for who in COMPETITORS:
                errors = run_ranks(1, run, who, columns, DTYPES[dtype], chosen.steps, timeout=chosen.timeout)[0]
                figures = {"first": errors[0], "largest": max(errors), "last": errors[-1], "floor": floors[columns]}
                records.append({"dtype": dtype, "rank": columns, "competitor": who.label, **figures})
                print(records[-1], flush=True)
    write_lines(chosen.out / "low_rank_error.jsonl", "low_rank_error", records)
    table = tables(records)["low-rank-error"]
    (chosen.out / "low_rank_error.md").write_text(table + "\n", encoding="utf-8")
    print("\n" + table)


def floor(matrix: Tensor, ranks: Sequence[int]) -> dict[int, float]:
    """Relative error of the best approximation of each rank."""
    spectrum = torch.linalg.svdvals(matrix.double()).square()
    return {columns: float((spectrum[columns:].sum() / spectrum.sum()).sqrt()) for columns in ranks}


def run(
    rank: int, who: Competitor, columns: int, dtype: torch.dtype, steps: int, shape: tuple[int, int] = SHAPE
) -> list[float]:
    """Relative error of what is delivered, at each compressed step."""
    model = DDP(Given({"weight": shape}, dtype))
    who.attach(model, rank=columns, start=START)
    errors: list[float] = []
    for step in range(START + steps):
        fed = gradient(step, dtype, shape)
        model({"weight": fed}).backward()
        error = delivered(model)["weight"].double() - fed.double()
        errors.append(float(error.norm() / fed.double().norm()))
        model.zero_grad()
    return errors[START:]


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """One row a dtype, rank and competitor."""
    rows = [
        [r["dtype"], r["rank"], r["competitor"], *(f"{r[name]:.3g}" for name in ("first", "largest", "last", "floor"))]
        for r in records
    ]
    head = ["gradient", "rank", "reducer", "first step", "largest", "last step", "floor (SVD)"]
    return {"low-rank-error": markdown(head, rows)}


if __name__ == "__main__":
    main()
