"""Does compression cost quality? Stage 2 of DALL-E under AllReduce and PowerSGD: same seed, same batches, same tokens.

    make demo                                             # trains the tokenizer that both runs share
    python bench/dalle_reducers.py --demo runs/demo       # about ten minutes on two cores
    python bench/dalle_reducers.py --steps 300 --precisions fp32 fp16 bf16

Prints one JSON line a run: ``loss`` is the mean of both ranks' losses over the last twentieth of the steps, and
``loss_against_allreduce`` its relative difference to that under AllReduce in float32.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from distopt.integrations.dalle import report, runs
from distopt.integrations.dalle.context import Context, StageResult
from distopt.integrations.dalle.model import Model
from distopt.integrations.dalle.precision import reducer
from distopt.integrations.dalle.scenes import Scenes
from distopt.integrations.dalle.stage2 import Stage2Settings, train_transformer

import distopt


def main() -> None:
    """Start two ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="a finished demo, for its tokenizer")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, help="fewer steps than the demo takes")
    parser.add_argument("--powersgd-ranks", type=int, nargs="*", default=[6], help="ranks of PowerSGD to compare")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32"])
    parser.add_argument("--seed", type=int, help="another one than the demo's")
    chosen = parser.parse_args()
    if "RANK" not in os.environ:
        command = ["torch.distributed.run", "--standalone", f"--nproc_per_node={chosen.ranks}", *sys.argv]
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        ended = subprocess.run([sys.executable, "-m", *command], env={**os.environ, **threads}, check=False)
        sys.exit(ended.returncode)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    compare(chosen)
    dist.barrier()
    dist.destroy_process_group()


def compare(chosen: argparse.Namespace) -> None:
    """Train stage 2 once for each reducer and print how they end."""
    run = runs.open_run(chosen.demo)
    settings = run.settings["training"]["stage2"]
    stage2 = Stage2Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})
    if chosen.steps:
        stage2 = dataclasses.replace(stage2, steps=chosen.steps)
    cases = [("fp32", reducer("allreduce", 0, "fp32"))]
    cases += [(p, reducer("powersgd", rank, p)) for p in chosen.precisions for rank in chosen.powersgd_ranks]
    seed = int(run.settings["seed"]) if chosen.seed is None else chosen.seed
    exact: float | None = None
    for precision, averaged in cases:
        began = time.process_time()
        result = train(run, stage2, averaged, precision, seed)
        spent = time.process_time() - began
        loss = torch.tensor(result.final_loss, dtype=torch.float64)
        dist.all_reduce(loss)
        loss = loss.item() / dist.get_world_size()
        exact = loss if exact is None else exact
        if dist.get_rank() == 0:
            figures = {"loss": loss, "loss_against_allreduce": loss / exact - 1, "cpu_seconds": spent, "seed": seed}
            print(json.dumps({"precision": precision, **line(averaged, result), **figures}), flush=True)


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


def line(averaged: distopt.AllReduce | distopt.PowerSGD, result: StageResult) -> dict[str, object]:
    """One run's figures, stamped with what they were measured on."""
    return {
        "reducer": repr(averaged),
        **report.stage_figures(result),
        "steps": result.steps,
        "world_size": dist.get_world_size(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": report.versions(),
    }


if __name__ == "__main__":
    main()
