"""The training loops that the cases run on every rank. Each is module-level, so that processes can be handed it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from bench.competitors import Competitor
from bench.workload import Given, Ledger, delivered, noise

SMALL = {"a": (64, 48), "b": (48, 32), "bias": (64,)}


def train_job(
    rank: int, who: Competitor, shapes: dict[str, Any], steps: int, start: int, warm: bool, options: Any
) -> Any:
    """A plain loop over noise."""
    model = DDP(Given(shapes), **options)
    attached = who.attach(model, start=start, warm=warm)
    ledger, kept = Ledger(), 0.0
    for step in range(steps):
        gradients = noise(shapes, rank, step)
        model(gradients).backward()
        ledger.enter(gradients, delivered(model))
        model.zero_grad()
        if step == start:
            kept = max(attached.residual_norms().values(), default=0.0)
    return {**ledger.close(attached), "kept": kept}


def infinite_job(rank: int, who: Competitor, bad: float) -> Any:
    """One infinity on one rank; the loop leaves out steps that are not finite, as a ``GradScaler`` does."""
    model = DDP(Given(SMALL))
    attached = who.attach(model)
    ledger, seen = Ledger(), False
    for step in range(20):
        gradients = noise(SMALL, rank, step)
        if step == 6 and rank == 1:
            gradients["a"][3, 5] = bad
        model(gradients).backward()
        received = delivered(model)
        if step == 6 and math.isinf(bad):
            seen = any(not bool(g.isfinite().all()) for g in received.values())
        else:
            ledger.enter(gradients, received)
        model.zero_grad()
    return {**ledger.close(attached), "seen": seen}


def zero_job(rank: int, who: Competitor, zero_steps: int) -> Any:
    """A layer behind a branch that starts at zero: its gradient is exactly zero for a while."""
    model = DDP(Given(SMALL))
    attached = who.attach(model)
    ledger = Ledger()
    for step in range(12):
        gradients = noise(SMALL, rank, step)
        if step < zero_steps:
            gradients["a"].zero_()
        model(gradients).backward()
        ledger.enter(gradients, delivered(model))
        model.zero_grad()
    return ledger.close(attached)


def unused_job(rank: int, who: Competitor, leave_out: bool) -> Any:
    """Layers that one rank, or all of them, leave unused at times."""
    shapes = {**SMALL, "never": (40, 32), "early": (40, 36), "sometimes": (36, 32)}
    model = DDP(Given(shapes), find_unused_parameters=leave_out)
    attached = who.attach(model)
    ledger = Ledger()
    for step in range(10):
        gradients = noise(shapes, rank, step)
        left_out = (
            {"never"} | ({"early"} if step >= 5 else set()) | ({"sometimes"} if rank == 1 and step % 2 else set())
        )
        if leave_out:
            gradients = {name: g for name, g in gradients.items() if name not in left_out}
        model(gradients).backward()
        ledger.enter(gradients, delivered(model))
        model.zero_grad()
    return ledger.close(attached)


class Laid(nn.Module):
    """One weight of 64 x 40 that lies in memory column by column, or row by row."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(40, 64).t() if transposed else torch.zeros(64, 40))

    def forward(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """As in `Given`."""
        return (self.a * gradients["a"]).sum()


def strided_job(rank: int, who: Competitor, transposed: bool) -> float:
    """A gradient of rank two, which two columns deliver exactly; the largest relative error."""
    model = DDP(Laid(transposed))
    who.attach(model, rank=2)
    worst = 0.0
    for step in range(6):
        factors = noise({"u": (64, 2), "v": (2, 40)}, 0, 0)
        gradient = (step + 1) * factors["u"] @ factors["v"]
        model({"a": (rank + 1) * gradient}).backward()
        worst = max(worst, float((model.module.a.grad - 1.5 * gradient).norm() / (1.5 * gradient).norm()))
        model.zero_grad()
    return worst


def half_job(rank: int, who: Competitor, size: float) -> float:
    """The same float16 gradient on both ranks. Of 40000, the sum is beyond float16 and the mean is not."""
    shapes = {"a": (64, 48), "bias": (64,)}
    model = DDP(Given(shapes, torch.float16))
    who.attach(model)
    worst = 0.0
    signs = noise({"a": (64, 2)}, 0, 0)["a"].sign()
    fed = {"a": size * signs.repeat_interleave(24, dim=1), "bias": torch.full((64,), size)}  # of rank two
    for _ in range(5):
        model({name: g.half() for name, g in fed.items()}).backward()
        errors = [float((g.double() - fed[n]).norm() / fed[n].norm()) for n, g in delivered(model).items()]
        worst = max(worst, *(math.inf if math.isnan(error) else error for error in errors))
        model.zero_grad()
    return worst


def scale_job(rank: int, who: Competitor, scale: float) -> float:
    """The loss scale falls to 1; the largest difference to a run whose scale never changes."""
    runs = []
    for first in (scale, 1.0):
        model = DDP(Given(SMALL))
        scaler = torch.amp.GradScaler("cpu", init_scale=first)
        runs.append((model, scaler, who.attach(model, scaler=scaler)))
    worst = 0.0
    for step in range(10):
        seen = []
        for model, scaler, _ in runs:
            if step == 6:
                scaler.update(1.0)
            scaler.scale(model(noise(SMALL, rank, step))).backward()
            seen.append({name: g / scaler.get_scale() for name, g in delivered(model).items()})
            model.zero_grad()
        worst = max(worst, *(float((seen[0][n] - g).norm() / g.norm()) for n, g in seen[1].items()))
    return worst


def save_job(rank: int, who: Competitor, shapes: dict[str, Any], stop: int, steps: int) -> Any:
    """A run that is saved on its way; this rank's checkpoint, and what was delivered afterwards."""
    model = DDP(Given(shapes, torch.float64))
    attached = who.attach(model)
    saved, after = b"", []
    for step in range(steps):
        if step == stop:
            saved = attached.save()
        model(noise(shapes, rank, step, torch.float64)).backward()
        if step >= stop:
            after.append(delivered(model))
        model.zero_grad()
    return saved, after


def resume_job(
    rank: int, who: Competitor, shapes: dict[str, Any], saved: list[bytes], stop: int, steps: int, ranks_of_data: int
) -> Any:
    """The run that goes on from it: the same data, shared by the ranks that there are now."""
    model = DDP(Given(shapes, torch.float64))
    who.attach(model, saved=saved[rank])
    share, after = ranks_of_data // dist.get_world_size(), []
    for step in range(stop, steps):
        parts = [noise(shapes, rank * share + i, step, torch.float64) for i in range(share)]
        model({name: sum(part[name] for part in parts) / share for name in shapes}).backward()
        after.append(delivered(model))
        model.zero_grad()
    return after


def accumulation_job(rank: int, who: Competitor) -> Any:
    """Three micro-batches a step, two under ``no_sync``, against one big batch: steps counted, largest difference."""
    windows, whole = DDP(Given(SMALL, torch.float64)), DDP(Given(SMALL, torch.float64))
    attached, other = who.attach(windows), who.attach(whole)
    worst = 0.0
    for step in range(6):
        micros = [noise(SMALL, rank, 3 * step + i, torch.float64) for i in range(3)]
        with windows.no_sync():
            windows(micros[0]).backward()
            windows(micros[1]).backward()
        windows(micros[2]).backward()
        whole({name: micros[0][name] + micros[1][name] + micros[2][name] for name in SMALL}).backward()
        big = delivered(whole)
        worst = max(worst, *(float((g - big[n]).norm() / big[n].norm()) for n, g in delivered(windows).items()))
        windows.zero_grad()
        whole.zero_grad()
    return attached.steps(), other.steps(), worst
