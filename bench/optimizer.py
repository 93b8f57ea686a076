"""What AdamW costs, by the format of its moments: time of a step, and bytes of moments and residuals per parameter.

    python -m bench.optimizer

Time: the parameters of transformer layers, gradients drawn once, every optimizer takes one step in turn, and so on for
many rounds. Given are the median time, and the median and the quartiles of its ratio to torch's foreach AdamW in the
same round. Processor time, so that other processes matter less.

Memory: all bytes that torch's CPU allocator has handed out after a few steps, gradients freed, beyond the parameters
themselves. Optimizers alone, and with ``distopt.register`` and PowerSGD of rank 4, whose residual is in the same
format; two models, one of matrices only (the 16-bit set), and one with embeddings, norms and biases, which stay in
float32. One rank.
"""

import argparse
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import distopt
from bench.memory import MARK, mark, on_one_thread, sorted_events
from bench.stamp import markdown, write_lines
from distopt.optim import AdamW
from tests.processes import run_ranks

SETTINGS = {"lr": 4.5e-4, "betas": (0.9, 0.96), "weight_decay": 4.5e-2}

TIMED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch foreach": lambda named: torch.optim.AdamW(named, foreach=True, **SETTINGS),
    "torch fused": lambda named: torch.optim.AdamW(named, fused=True, **SETTINGS),
    "distopt float32": lambda named: AdamW(named, **SETTINGS),
    "distopt bfloat16": lambda named: AdamW(named, moments="bfloat16", **SETTINGS),
    "distopt packed16": lambda named: AdamW(named, moments="packed16", max_variance=5, **SETTINGS),
}
BASELINE = "torch foreach"

MEASURED = {
    "torch foreach": (TIMED["torch foreach"], None),
    "distopt float32": (TIMED["distopt float32"], None),
    "distopt bfloat16": (TIMED["distopt bfloat16"], torch.bfloat16),
    "distopt packed16": (TIMED["distopt packed16"], "1-6-9"),
}
"""Optimizer, and the format of the residual beside it."""


class Layer(nn.Module):
    """The parameters of a transformer layer; it is only ever a residual stack of linear maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Use every parameter."""
        x = self.norm(x)
        for linear in self.attention:
            x = x + linear(x)
        return x + self.down(self.up(x))


def transformer(width: int, layers: int, words: int) -> nn.Module:
    """An embedding, layers, and an output layer."""
    parts: dict[str, nn.Module] = {"embedding": nn.Embedding(words, width)}
    parts |= {f"layer{index}": Layer(width) for index in range(layers)}
    return nn.Sequential(OrderedDict({**parts, "lm_head": nn.Linear(width, words)}))


def matrices(width: int, layers: int) -> nn.Module:
    """Nothing but matrices that take part in all savings."""
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])


def main() -> None:
    """Read the command line, measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    times = [{"what": "time", **record} for record in timed(chosen.rounds, chosen.width, chosen.layers)]
    memory = [{"what": "memory", **record} for record in measured()]
    write_lines(chosen.out / "optimizer.jsonl", "optimizer", times + memory)
    text = "\n\n".join(tables(times + memory).values()) + "\n"
    (chosen.out / "optimizer.md").write_text(text, encoding="utf-8")
    print(text)


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Both tables, by their marks."""
    times, memory = ([r for r in records if r["what"] == what] for what in ("time", "memory"))
    return {"optimizer-time": time_table(times), "optimizer-memory": memory_table(memory)}


def timed(rounds: int, width: int, layers: int) -> list[dict[str, Any]]:
    """Time a step of every optimizer, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    models = {name: transformer(width, layers, words=1000) for name in TIMED}
    optimizers = {name: make(models[name].named_parameters()) for name, make in TIMED.items()}
    gradients = [torch.randn_like(parameter) * 1e-3 for parameter in models[BASELINE].parameters()]
    for model in models.values():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
    for turn in range(rounds + 2):
        for name, optimizer in optimizers.items():
            began = time.process_time()
            optimizer.step()
            if turn >= 2:  # the first two make the state
                seconds[name].append(time.process_time() - began)
    count = sum(gradient.numel() for gradient in gradients)
    return [summary(name, times, seconds[BASELINE], count) for name, times in seconds.items()]


def summary(name: str, times: list[float], baseline: list[float], count: int) -> dict[str, Any]:
    """Medians and quartiles of one optimizer."""
    ratios = [ours / theirs for ours, theirs in zip(times, baseline, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    each = statistics.median(times) / count * 1e9
    settings = {"optimizer": name, "rounds": len(times), "parameters": count}
    return {**settings, "ns": each, "ratio": middle, "ratio_low": low, "ratio_high": high}


def measured() -> list[dict[str, Any]]:
    """Bytes per parameter of every optimizer, with and without residuals, on both models."""
    records: list[dict[str, Any]] = []
    for name in MEASURED:
        for residual in (False, True):
            for kind in ("matrices", "transformer"):
                figures = run_ranks(1, measure, name, residual, kind)[0]
                records.append({"optimizer": name, "residual": residual, "model": kind, **figures})
    return records


def measure(rank: int, name: str, residual: bool, kind: str) -> dict[str, float]:
    """Bytes per parameter of one set-up, beyond the parameters."""
    with on_one_thread(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model, optimizer = train(name, residual, kind)
    totals, marks = [], []
    for size, total in sorted_events(profiler):
        if size == MARK:
            marks.append(len(totals))
        totals.append(total)
    count = sum(parameter.numel() for parameter in model.parameters())
    reduced = sum(p.numel() for p, s in optimizer.state.items() if s["exp_avg"].dtype != torch.float32)
    held = (totals[marks[1]] - totals[marks[0]]) / count
    return {"bytes": held, "parameters": count, "in 16 bits": reduced}


def train(name: str, residual: bool, kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Some steps, with a mark after the model is built and after the last."""
    model = matrices(1024, 16) if kind == "matrices" else transformer(512, 4, words=1000)
    inputs = torch.randn(4, 1024) if kind == "matrices" else torch.arange(4)
    make, dtype = MEASURED[name]
    registration = None
    mark()
    optimizer = make(model.named_parameters())
    if residual:
        registration = distopt.register(model.named_parameters(), distopt.PowerSGD(4, residual_dtype=dtype))
    for _ in range(3):
        model(inputs).square().mean().backward()
        if registration is not None:
            registration.reduce()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    mark()
    return model, optimizer


def time_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The figures of time as a table."""
    rows = [
        [r["optimizer"], f"{r['ns']:.2f}", f"{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})"]
        for r in records
    ]
    return markdown(["optimizer", "ns a parameter", "of torch's foreach (quartiles)"], rows)


def memory_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The figures of memory as a table."""
    cells = {(r["optimizer"], r["residual"], r["model"]): f"{r['bytes']:.2f}" for r in records}
    columns = [(residual, model) for residual in (False, True) for model in ("matrices", "transformer")]
    head = ["bytes a parameter"] + [
        ("moments and residual" if residual else "moments") + (", 16-bit set" if model == "matrices" else ", all")
        for residual, model in columns
    ]
    return markdown(head, [[name, *(cells[name, *column] for column in columns)] for name in MEASURED])


if __name__ == "__main__":
    main()
