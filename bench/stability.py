"""Do residuals stay bounded under noise, and do uncompressed gradients stay exact? 10,000 steps on two ranks.

    python -m bench.stability                        # about ten minutes on two cores
    python -m bench.stability --steps 1000

Each rank is fed independent, stationary, standard normal gradients of a 64 x 64 weight and of a bias, through DDP on
gloo, all in one bucket: the one layout in which torch's hook can be trusted to run on gloo. After 10, 100, 1,000, ...
steps, prints the norm of rank 0's residuals relative to one gradient, and the relative error of the delivered bias,
which is sent whole and should be exact to its dtype: the root mean square of the last ten steps.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from bench.competitors import Competitor, Distopt, Torch
from bench.stamp import markdown, write_lines
from bench.workload import Given, delivered, noise
from tests.processes import run_ranks

SHAPES = {"weight": (64, 64), "bias": (64,)}


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is compared.

    Args:
        who: the competitor.
        dtype: of parameters and gradients.
    """

    who: Competitor
    dtype: torch.dtype


VARIANTS = [
    Variant(Distopt(), torch.float32),
    Variant(Torch(), torch.float32),
    Variant(Distopt(), torch.bfloat16),
    Variant(Torch(), torch.bfloat16),
    Variant(Distopt("distopt, bfloat16 residual", {"residual_dtype": torch.bfloat16}), torch.bfloat16),
    Variant(Distopt("distopt, 1-6-9 residual", {"residual_dtype": "1-6-9"}), torch.float32),
]
"""One line each; further settings of a reducer go into ``Distopt("its label", {"setting": value})``."""


def main() -> None:
    """Read the command line, run every variant, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rank", type=int, default=4, help="rank of PowerSGD")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one variant")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    marks = [10**k for k in range(1, 9) if 10**k <= chosen.steps]
    records: list[dict[str, Any]] = []
    for variant in VARIANTS:
        points = run_ranks(2, run, variant, chosen.rank, marks, timeout=chosen.timeout)[0]
        for point in points:
            dtype = str(variant.dtype).removeprefix("torch.")
            records.append({"competitor": variant.who.label, "dtype": dtype, "rank": chosen.rank, **point})
            print(records[-1], flush=True)
    write_lines(chosen.out / "stability.jsonl", "stability", records)
    table = tables(records)["stability"]
    (chosen.out / "stability.md").write_text(table + "\n", encoding="utf-8")
    print("\n" + table)


def run(rank: int, variant: Variant, columns: int, marks: list[int]) -> list[dict[str, float]]:
    """Feed noise up to the last mark; the figures at each."""
    model = DDP(Given(SHAPES, variant.dtype))
    attached = variant.who.attach(model, rank=columns)
    points: list[dict[str, float]] = []
    errors: list[float] = []
    for step in range(marks[-1]):
        # The mean of what both ranks are fed, in float64: each knows what the other is fed.
        both = [noise(SHAPES, r, step, variant.dtype) for r in range(dist.get_world_size())]
        model(both[rank]).backward()
        mean = torch.stack([fed["bias"].double() for fed in both]).mean(0)
        errors.append(float((delivered(model)["bias"].double() - mean).norm() / mean.norm()))
        model.zero_grad()
        if step + 1 in marks:
            norms = attached.residual_norms()
            size = {name: float(g.double().norm()) for name, g in both[rank].items()}
            last = torch.tensor(errors[-10:], dtype=torch.float64)
            points.append(
                {
                    "step": step + 1,
                    "weight_residual": norms["weight"] / size["weight"],
                    "bias_residual": norms.get("bias", 0.0) / size["bias"],
                    "bias_error": float(last.square().mean().sqrt()),
                }
            )
    return points


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """One row a variant and figure, one column a mark."""
    marks = list(dict.fromkeys(record["step"] for record in records))
    figures = {
        "weight_residual": "residual of the weight / gradient",
        "bias_residual": "residual of the bias / gradient",
        "bias_error": "relative error of the delivered bias",
    }
    rows: list[list[str]] = []
    variants = dict.fromkeys((record["dtype"], record["competitor"]) for record in records)
    for figure, title in figures.items():
        for dtype, who in variants:
            points = [r[figure] for r in records if (r["dtype"], r["competitor"]) == (dtype, who)]
            rows.append([title, dtype, who, *(f"{point:.2g}" for point in points)])
    head = ["figure", "gradients", "reducer", *(f"{mark:,} steps" for mark in marks)]
    return {"stability": markdown(head, rows)}


if __name__ == "__main__":
    main()
