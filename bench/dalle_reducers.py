"""Does compression cost quality? Stage 2 of DALL-E under AllReduce and PowerSGD: same seed, same batches, same tokens.

    python -m bench.dalle_reducers                        # about ten minutes on two cores
    python -m bench.dalle_reducers --steps 300 --precisions fp32 fp16 bf16
    python -m bench.dalle_reducers --demo runs/demo       # with the tokenizer of your own ``make demo``

The loss is the mean over both ranks of the last twentieth of the steps; ``loss_against_allreduce`` is its relative
difference to that under AllReduce in float32, and the target is 1 %. Writes JSON lines and a table.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distopt.integrations.dalle import report, runs
from distopt.integrations.dalle.context import Context, StageResult
from distopt.integrations.dalle.model import Model
from distopt.integrations.dalle.precision import reducer
from distopt.integrations.dalle.stage2 import Stage2Settings, train_transformer
from distopt.integrations.scenes.draw import Scenes

import distopt
from bench.stamp import markdown, write_lines

TARGET = 0.01
"""Of the loss under AllReduce, either way."""


def main() -> None:
    """Start two ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=runs.BUNDLED, help="a finished demo, for its tokenizer")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, help="fewer steps than the demo takes")
    parser.add_argument("--powersgd-ranks", type=int, nargs="*", default=[6], help="ranks of PowerSGD to compare")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32"])
    parser.add_argument("--seed", type=int, help="another one than the demo's")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    if "RANK" not in os.environ:
        command = ["torch.distributed.run", "--standalone", f"--nproc_per_node={chosen.ranks}", "-m"]
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        ended = subprocess.run(
            [sys.executable, "-m", *command, "bench.dalle_reducers", *sys.argv[1:]],
            env={**os.environ, **threads},
            check=False,
        )
        sys.exit(ended.returncode)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    records = compare(chosen)
    if dist.get_rank() == 0:
        write_lines(chosen.out / "dalle_reducers.jsonl", "dalle_reducers", records)
        text = tables(records)["dalle-reducers"]
        (chosen.out / "dalle_reducers.md").write_text(text + "\n", encoding="utf-8")
        print("\n" + text)
    dist.barrier()
    dist.destroy_process_group()


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """One row a reducer, by its mark."""
    rows: list[list[str]] = []
    for r in records:
        away = r["loss_against_allreduce"]
        verdict = "met" if abs(away) <= TARGET else "**not met**"
        rows.append([
            f"`{r['reducer']}`",
            r["precision"],
            str(r["seed"]),
            f"{r['steps']:,}",
            f"{r['loss']:.4f}",
            f"{100 * away:+.2f} %" if away else "",
            verdict if away else "",
            f"{100 * r['saving']:.1f} %",
            str(r["skipped_steps"]),
            f"{r['cpu_ms']:.0f}",
        ])  # fmt: skip
    target = f"target: within {100 * TARGET:g} %"
    head = [
        "reducer",
        "precision",
        "seed",
        "steps",
        "loss",
        "against AllReduce",
        target,
        "bytes saved",
        "skipped steps",
    ]
    return {"dalle-reducers": markdown([*head, "CPU ms a step and rank"], rows)}


def compare(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Train stage 2 once for each reducer; how they end."""
    run = runs.open_run(chosen.demo)
    settings = run.settings["training"]["stage2"]
    stage2 = Stage2Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})
    if chosen.steps:
        stage2 = dataclasses.replace(stage2, steps=chosen.steps)
    cases = [("fp32", reducer("allreduce", 0, "fp32"))]
    cases += [(p, reducer("powersgd", rank, p)) for p in chosen.precisions for rank in chosen.powersgd_ranks]
    seed = int(run.settings["seed"]) if chosen.seed is None else chosen.seed
    exact: float | None = None
    records: list[dict[str, Any]] = []
    for precision, averaged in cases:
        began = time.process_time()
        result = train(run, stage2, averaged, precision, seed)
        spent = time.process_time() - began
        loss = torch.tensor(result.final_loss, dtype=torch.float64)
        dist.all_reduce(loss)
        mean = loss.item() / dist.get_world_size()
        exact = mean if exact is None else exact
        figures = {"loss": mean, "loss_against_allreduce": mean / exact - 1, "cpu_ms": 1e3 * spent / result.steps}
        records.append({"precision": precision, "seed": seed, **line(averaged, result), **figures})
        if dist.get_rank() == 0:
            print(records[-1], flush=True)
    return records


def train(
    run: runs.Run, stage2: Stage2Settings, averaged: distopt.AllReduce | distopt.PowerSGD, precision: str, seed: int
) -> StageResult:
    """Stage 2 of ``run`` from the start."""
    model = Model.load(run, torch.device("cpu"))
    context = Context(
        rank=dist.get_rank(), world_size=dist.get_world_size(), seed=seed, reducer=averaged, precision=precision
    )
    task = Scenes(int(run.settings["task_seed"]))
    return train_transformer(task, model.dvae, model.tokenizer, model.transformer.settings, stage2, context)


def line(averaged: distopt.AllReduce | distopt.PowerSGD, result: StageResult) -> dict[str, Any]:
    """One run's figures."""
    return {
        "reducer": repr(averaged),
        **report.stage_figures(result),
        "steps": result.steps,
        "world_size": dist.get_world_size(),
    }


if __name__ == "__main__":
    main()
