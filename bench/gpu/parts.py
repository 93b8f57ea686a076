"""What is timed, part by part; each gives its records one by one, so that what is done is kept if it is ended."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from bench.gpu.clock import Clock, Times, relative
from bench.gpu.ways import HALF, MODELS, OURS, PACKED, PLAIN, WAYS, kernels, missing, step_of
from distopt.numerics.orthogonal import orthonormal_rows
from distopt.optim import AdamW
from distopt.scaling.boundary import enter, leave

Record = dict[str, Any]

FIVE = 5
"""Times that PowerSGD with error feedback must read or write a gradient's bytes."""
PRODUCTS = 4
"""P, Q, what is delivered and what is left: each two operations an element and column."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Args:
        models: names in `MODELS`.
        ranks: of the factors.
        dtypes: of the gradients.
        shapes: ``(k, n, r)`` of the stacks that are orthonormalised: k matrices of n rows and r columns.
        width: of the matrices that optimizers update.
        layers: a matrix each.
        numbers: that the scaler scales.
        copied: bytes of the array that is copied for the floor.
        side: of the matrices that are multiplied for the floor.
    """

    models: Sequence[str]
    ranks: Sequence[int] = (4, 32, 112)
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
    shapes: Sequence[tuple[int, int, int]] = (
        (64, 4096, 32),
        (1, 1024, 4),
        (64, 1024, 4),
        (1, 4096, 32),
        (256, 4096, 1),
        (256, 1488, 112),
        (24, 8192, 112),
        (1, 50257, 32),
        (8, 4096, 256),
        (4, 4096, 512),
    )
    width: int = 4096
    layers: int = 24
    numbers: int = 2**28
    copied: int = 2**31
    side: int = 8192


FULL = Plan(("resnet50", "gpt2-1.3b", "dalle-12b-shard"))
QUICK = dataclasses.replace(FULL, models=("resnet50",), ranks=(4, 32), shapes=FULL.shapes[:4], layers=4)
TINY = Plan(("tiny",), (1, 2), shapes=((2, 24, 3),), width=16, layers=2, numbers=64, copied=256, side=16)


def floors(plan: Plan, clock: Clock) -> Iterator[Record]:
    """How fast this device copies memory and multiplies matrices."""
    source = torch.rand(plan.copied // 4, device=clock.device)
    target = torch.empty_like(source)
    found = clock.time(lambda: target.copy_(source), lambda: target.fill_(float("nan")))
    assert torch.equal(target, source)
    yield {"floor": "copy", "per_second": 2 * source.nbytes / found.ms * 1e3, **_times(found)}
    for name, dtype in {"bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}.items():
        left, right = (torch.randn(plan.side, plan.side, device=clock.device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        found = clock.time(lambda a=left, b=right, c=out: torch.mm(a, b, out=c))
        torch.set_float32_matmul_precision("highest")
        yield {"floor": name, "per_second": 2 * plan.side**3 / found.ms * 1e3, **_times(found)}


def compression(plan: Plan, clock: Clock, ways: Sequence[str] = WAYS) -> Iterator[Record]:
    """A step of every way, for every model, precision and rank."""
    for model in plan.models:
        for dtype in plan.dtypes:
            generator = torch.Generator(clock.device).manual_seed(0)
            shapes = MODELS[model]()
            count = sum(map(math.prod, shapes))
            fed = torch.randn(count, generator=generator, device=clock.device).to(dtype)
            for rank in plan.ranks:
                wanted = None
                for way in ways:
                    settings = {"model": model, "dtype": _name(dtype), "rank": rank, "way": way, "bytes": fed.nbytes}
                    settings["operations"] = 2 * PRODUCTS * sum(_products(shape, rank) for shape in shapes)
                    reason = missing(way, dtype)
                    if reason is not None:
                        yield {**settings, "missing": reason}
                        continue
                    found: Record = {}
                    try:
                        found, sent = _compressed(shapes, fed, way, rank, clock)
                        if way == OURS:
                            wanted = sent
                        elif way in (PACKED, HALF, PLAIN) and wanted is not None:
                            found["difference"] = relative(wanted, sent)
                        del sent
                    except (RuntimeError, AssertionError, ValueError) as error:
                        found = {"error": _line(error)}
                    yield {**settings, **found}


def _compressed(
    shapes: Sequence[tuple[int, ...]], fed: Tensor, way: str, rank: int, clock: Clock
) -> tuple[Record, Tensor]:
    """Times and memory of one way, and what its first step delivers."""
    bucket = torch.empty_like(fed)
    step = step_of(way, shapes, bucket, rank)
    clock.poison(fed.nbytes)
    bucket.copy_(fed)
    step()
    first = bucket.clone()
    if not bool(torch.isfinite(first).all()):
        raise AssertionError("what is delivered is not finite")
    found = clock.time(step, lambda: bucket.copy_(fed))
    bucket.copy_(fed)
    return {**_times(found), "peak_bytes": clock.peak(step)}, first


def launches(plan: Plan, clock: Clock, ways: Sequence[str] = WAYS) -> Iterator[Record]:
    """How often the host calls the device in a step, and how often it waits for it."""
    shapes = MODELS[plan.models[0]]()
    fed = torch.randn(sum(map(math.prod, shapes)), device=clock.device)
    for rank in plan.ranks[:2]:
        for way in ways:
            if missing(way, torch.float32) is not None:
                continue
            bucket = fed.clone()
            step = step_of(way, shapes, bucket, rank)
            for _ in range(3):
                bucket.copy_(fed)
                step()
            yield {"model": plan.models[0], "rank": rank, "way": way, **calls_of(step, clock)}


def calls_of(step: Callable[[], object], clock: Clock) -> Record:
    """Count the calls of CUDA's run time on this thread while ``step`` runs."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if clock.device.type == "cuda" else [])]
    clock.synchronize()
    with profile(activities=activities) as profiler:
        with record_function("bench::step"):
            step()
        clock.synchronize()
    events = list(profiler.events() or [])
    whole = next(event for event in events if event.name == "bench::step").time_range
    inside = [e.name for e in events if whole.start <= e.time_range.start and e.time_range.end <= whole.end]
    return {
        "launches": sum("LaunchKernel" in name for name in inside),
        "copies": sum(name.startswith(("cudaMemcpy", "cudaMemset")) for name in inside),
        "waits": sum(name.startswith("cuda") and "Synchronize" in name for name in inside),
    }


def orthogonal(plan: Plan, clock: Clock) -> Iterator[Record]:
    """Orthonormal columns, by ours with kernels and without, and by torch's QR."""
    for count, rows, rank in plan.shapes:
        stack = torch.randn(count, rank, rows, device=clock.device)
        eye = torch.eye(rank, device=clock.device)
        for way in (OURS, PLAIN, "torch.linalg.qr"):
            settings = {"count": count, "rows": rows, "rank": rank, "way": way, "bytes": 2 * stack.nbytes}
            try:
                clock.poison(4 * stack.nbytes)
                with kernels("off" if way == PLAIN else None):
                    run = _orthonormal(way, stack)
                    q = run()
                    error = float((q.double() @ q.mT.double() - eye).abs().max())
                    found = {**_times(clock.time(run)), "error_of_identity": error}
            except (RuntimeError, AssertionError, ValueError) as error:
                found = {"error": _line(error)}
            yield {**settings, **found}


def _orthonormal(way: str, stack: Tensor) -> Callable[[], Tensor]:
    if way == "torch.linalg.qr":
        columns = stack.mT.contiguous()
        return lambda: torch.linalg.qr(columns).Q.mT
    return lambda: orthonormal_rows([stack])[0]


def optimizer(plan: Plan, clock: Clock) -> Iterator[Record]:
    """A step of AdamW, by the format of its moments."""
    settings: Mapping[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.96), "weight_decay": 0.05}
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "torch fused float32": lambda named: torch.optim.AdamW(named, fused=True, **settings),
        "distopt float32": lambda named: AdamW(named, **settings),
        "distopt bfloat16": lambda named: AdamW(named, moments="bfloat16", **settings),
        "distopt packed16": lambda named: AdamW(named, moments="packed16", max_variance=5, **settings),
        "distopt packed16, capturable": lambda named: AdamW(
            named, moments="packed16", max_variance=5, capturable=True, **settings
        ),
        "distopt packed16, kernels off": lambda named: AdamW(named, moments="packed16", max_variance=5, **settings),
    }
    wanted: Tensor | None = None
    for way, make in makers.items():
        torch.manual_seed(0)
        model = nn.ParameterDict(
            {str(i): nn.Parameter(torch.randn(plan.width, plan.width, device=clock.device)) for i in range(plan.layers)}
        )
        for parameter in model.values():
            parameter.grad = torch.randn_like(parameter)
        before = model["0"].detach().clone()
        elements = plan.layers * plan.width**2
        record: Record = {"way": way, "elements": elements}
        try:
            with kernels("off" if way.endswith("off") else None):
                chosen = make(model.named_parameters())
                chosen.step()
                moved = model["0"].detach() - before
                wanted = moved if wanted is None else wanted
                record |= {**_times(clock.time(chosen.step)), "difference": relative(moved, wanted)}
        except (RuntimeError, AssertionError, ValueError) as error:
            record["error"] = _line(error)
        yield record


def scaler(plan: Plan, clock: Clock) -> Iterator[Record]:
    """The two ends of a residual branch, backward: scale, filter and cast."""
    scale = torch.tensor(1024.0, device=clock.device)
    wide = torch.randn(plan.numbers, device=clock.device)
    narrow = wide.half()
    cases: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]] = {
        "leave, float32 to float16": (lambda x: leave(x, scale), narrow, wide, (wide * 1024).half()),
        "enter, float16": (lambda x: enter(x, 1 / scale), narrow, narrow, (narrow.float() / 1024).half()),
    }
    for name, (function, x, incoming, wanted) in cases.items():
        for way in (OURS, PLAIN):
            record: Record = {"case": name, "way": way, "bytes": incoming.nbytes + wanted.nbytes}
            try:
                with kernels("off" if way == PLAIN else None):
                    leaf = x.detach().requires_grad_()
                    out = function(leaf)

                    def run(out: Tensor = out, leaf: Tensor = leaf, incoming: Tensor = incoming) -> Tensor:
                        return torch.autograd.grad(out, leaf, incoming, retain_graph=True)[0]

                    clock.poison(2 * incoming.nbytes)
                    assert torch.equal(run(), wanted), "the gradient is wrong"
                    record |= _times(clock.time(run))
            except (RuntimeError, AssertionError, ValueError) as error:
                record["error"] = _line(error)
            yield record


PARTS: Mapping[str, Callable[[Plan, Clock], Iterator[Record]]] = {
    "floors": floors,
    "orthogonal": orthogonal,
    "optimizer": optimizer,
    "scaler": scaler,
    "launches": launches,
    "compression": compression,
}


def records_of(part: str, plan: Plan, clock: Clock, until: float) -> Iterator[Record]:
    """The records of one part; what comes too late is left out, and a last record says so.

    Args:
        part: one of `PARTS`.
        plan: how much.
        clock: on which device.
        until: `time.monotonic` at which to stop.
    """
    for record in PARTS[part](plan, clock):
        yield {"part": part, **record}
        if time.monotonic() > until:
            yield {"part": part, "cut_short": True}
            return


def _times(times: Times) -> Record:
    return dataclasses.asdict(times)


def _products(shape: tuple[int, ...], rank: int) -> int:
    """Elements times columns of a parameter's matrix."""
    if len(shape) < 2:
        return 0
    size = math.prod(shape)
    return size * min(rank, shape[0], size // shape[0])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
