"""Builds, checks and times everything that runs on a GPU, beside its peers and its floors. One command, ten minutes.

    python -m bench.gpu                              # from the root of a checkout, on a machine with an NVIDIA GPU
    python -m bench.gpu --quick                      # a few minutes: ResNet-50 alone, fewer shapes
    python -m bench.gpu --parts checks compression --models resnet50
    python -m bench.gpu --dalle                      # the demo's training by precision, and the demo, besides
    DISTOPT_KERNELS=on TRITON_INTERPRET=1 python -m bench.gpu --device cpu    # a dry run, whose times mean nothing

It needs torch, Triton and numpy, and for the checks pytest and hypothesis; nothing has to be installed. The package of
PowerSGD's author is compared where it is installed, or where its folder ``powersgd`` lies in the root. Every part is a
process of its own, so that one that fails leaves the others alone, and what it has measured so far; parts that come too
late are left out, and that is said. Without a GPU it says so in one line, and ends with exit code 2; 1 says that a
check or a part failed.

- ``floors``: how fast the device copies memory and multiplies matrices;
- ``checks``: the tests of the kernels, and of streams, on the device;
- ``orthogonal``, ``optimizer``, ``scaler``: each beside what torch has, and with our kernels off;
- ``streams``: what a trace of a step shows, ours over NCCL and gloo, and torch's hook over NCCL;
- ``launches``: calls of the device a bucket, and waits for it;
- ``compression``: a whole step of models' gradients, nothing sent, beside torch's hook, epfml's package and Dion's way.

Given are medians and quartiles by CUDA events; data are random, fresh memory is full of NaN, caches are cold.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu import report
from bench.gpu.checks import check
from bench.gpu.clock import Clock
from bench.gpu.dalle import dalle
from bench.gpu.parts import FULL, QUICK, TINY, Plan, records_of
from bench.gpu.traces import streams
from bench.gpu.ways import MODELS
from bench.stamp import ROOT, append_lines, read_lines

CANNOT_RUN = 2
STREAMS, CHECKS, DALLE = "streams", "checks", "dalle"
ALL = ("floors", CHECKS, "orthogonal", "optimizer", "scaler", STREAMS, "launches", "compression")
SECONDS, CHECKED = 560, 200
"""All together, and of these the checks at most."""
SPARE = 20
"""Seconds by which a part may be late before it is ended."""

tables = report.tables


def main() -> None:
    """Read the command line, run the parts, and report."""
    chosen = _arguments()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: this machine has no CUDA GPU, or this torch cannot use it: nothing was measured")
        sys.exit(CANNOT_RUN)
    if chosen.as_part:
        _part(chosen)
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / "gpu.jsonl"
    parts = [*chosen.parts, *([DALLE] if chosen.dalle and DALLE not in chosen.parts else [])]
    keep_others(file, parts)
    print(", ".join(f"{name} {value}" for name, value in facts(chosen.device).items()), flush=True)
    until = time.monotonic() + chosen.seconds
    failed = [name for name, model in _processes(parts, chosen) if not _ran(name, model, chosen, until)]
    records = read_lines(file) if file.exists() else []
    text = "\n\n".join(report.tables(records).values())
    (chosen.out / "gpu.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)
    failed += ["checks" for r in records if r.get("part") == "checks" and not r.get("passed", True)]
    failed += sorted({r["part"] for r in records if "error" in r and r["part"] in parts})
    if failed:
        print(f"failed: {', '.join(dict.fromkeys(failed))}; see {file}")
        sys.exit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer models, ranks and shapes")
    parser.add_argument("--parts", nargs="+", choices=(*ALL, DALLE), default=list(ALL))
    parser.add_argument("--models", nargs="+", choices=[name for name in MODELS if name != "tiny"])
    parser.add_argument("--dalle", action="store_true", help="the demo's training by precision, and the demo, besides")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run with tiny shapes")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no part is begun")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--as-part", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.seconds <= 0:
        parser.error("--seconds is above 0")
    chosen.out = chosen.out.resolve()
    return chosen


def facts(device: str) -> dict[str, Any]:
    """The device and what decides what runs on it."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    common = {"triton": version, "kernels": os.environ.get("DISTOPT_KERNELS", "auto")}
    if device == "cpu":
        return {"gpu": "none: a dry run, whose times mean nothing", "torch": torch.__version__, **common}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": f"{properties.name}, {properties.multi_processor_count} multiprocessors",
        "gigabytes": round(properties.total_memory / 1e9),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **common,
    }


def keep_others(file: Path, parts: Sequence[str]) -> None:
    """Take the records of some parts out of a file of results, as they are measured anew."""
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(line for line in lines if json.loads(line).get("part") not in parts), encoding="utf-8")


def _plan(chosen: argparse.Namespace) -> Plan:
    if chosen.device == "cpu":
        return TINY
    plan = QUICK if chosen.quick else FULL
    return dataclasses.replace(plan, models=chosen.models) if chosen.models else plan


def _processes(parts: Sequence[str], chosen: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Parts in their order; a process for each model that is compressed."""
    models = _plan(chosen).models
    ordered = [part for part in (*ALL, DALLE) if part in parts]
    return [(p, m) for p in ordered for m in (models if p == "compression" else (None,))]


def _ran(part: str, model: str | None, chosen: argparse.Namespace, until: float) -> bool:
    """Run one part in a process of its own; tell whether it came to its end."""
    left = until - time.monotonic()
    label = " ".join(filter(None, (part, model)))
    if left <= 0:
        print(f"== {label}: left out, the time is over", flush=True)
        append_lines(chosen.out / "gpu.jsonl", "gpu", [{"part": part, "left_out": label}])
        return True
    command = [sys.executable, "-m", "bench.gpu", "--as-part", part, "--device", chosen.device]
    command += ["--seconds", str(left), "--out", str(chosen.out), *(["--quick"] if chosen.quick else [])]
    if model is not None and chosen.device == "cuda":
        command += ["--models", model]
    began = time.monotonic()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=left + SPARE).returncode
    except subprocess.TimeoutExpired:
        code = None
    print(f"== {label}: {time.monotonic() - began:.0f} s, {'ended, too late' if code is None else f'exit code {code}'}")
    return code == 0


def _part(chosen: argparse.Namespace) -> None:
    """What a part's own process does."""
    until = time.monotonic() + chosen.seconds
    plan, told = _plan(chosen), facts(chosen.device)
    if chosen.as_part == CHECKS:
        paths = {} if chosen.device == "cuda" else {"paths": ["tests/kernels/test_choice.py"]}
        records = check(min(CHECKED, chosen.seconds), chosen.out / "gpu-checks", **paths)
    else:
        clock = Clock(torch.device(chosen.device), seconds=0.2 if chosen.quick else 0.7)
        if chosen.as_part == DALLE:
            records = dalle(clock, chosen.out, tiny=chosen.device == "cpu")
        elif chosen.as_part == STREAMS:
            records = streams(chosen.out) if chosen.device == "cuda" else iter(())
        else:
            records = records_of(chosen.as_part, plan, clock, until)
    for record in records:
        append_lines(chosen.out / "gpu.jsonl", "gpu", [{**record, **told}])
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()), flush=True)


if __name__ == "__main__":
    main()
