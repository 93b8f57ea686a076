"""A link and a processor, timed in a second or two: where `plan` is not told their rates."""

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from distopt.comm.communicator import Communicator
from distopt.errors import SettingError
from distopt.planning.costs import BOTH
from distopt.planning.machine import Algorithm, Processor
from distopt.reducers.powersgd import PowerSGD
from distopt.reducers.reducer import Bucket, Place, Plan, Slot, State

_SIDE, _MATRICES, _RANKS = 1024, 4, (4, 64)
_SMALL, _LARGEST = 1024, 64 * 2**20
_LONG_ENOUGH = 0.2
"""Seconds that an all-reduce should take to tell the rate of the link."""


class Link(NamedTuple):
    """Bytes a second out of a rank, and seconds of a message."""

    bandwidth: float
    latency: float


def measure(process_group: dist.ProcessGroup | None = None, algorithm: Algorithm = "tree") -> tuple[Link, Processor]:
    """Time the link between the ranks and what this machine computes, in a second or two. Collective.

    What comes back is what `plan` takes as ``bandwidth``, ``latency``, ``memory_rate``, ``flops_rate`` and
    ``bucket_seconds``. All ranks compute at the same time, as they do in a step.

    Args:
        process_group: of the ranks; the default one if ``None``.
        algorithm: as for `plan`: of how many messages the latency is that of one.

    Raises:
        SettingError: if there is no process group.
    """
    link = measure_link(process_group, algorithm)
    return link, measure_processor()


def measure_link(process_group: dist.ProcessGroup | None = None, algorithm: Algorithm = "tree") -> Link:
    """Time all-reduces of two sizes: what the larger takes longer tells the rate. Collective; see `measure`.

    Args:
        process_group: of the ranks; the default one if ``None``.
        algorithm: as for `plan`.

    Raises:
        SettingError: if there is no process group.
    """
    if not dist.is_initialized():
        raise SettingError("bandwidth", None, "a rate, unless torch.distributed is initialised to measure it")
    communicator = Communicator(process_group or dist.distributed_c10d._get_default_group())  # pyright: ignore
    if communicator.world_size == 1:
        return Link(math.inf, 0.0)
    device = torch.device("cuda" if dist.get_backend(communicator.group) == "nccl" else "cpu")
    ranks = communicator.world_size

    def seconds(nbytes: int, repetitions: int) -> float:
        payload = torch.zeros(nbytes // 4, device=device)
        times = [_timed(lambda: communicator.average_(payload), device) for _ in range(repetitions)]
        slowest = torch.tensor([statistics.median(times[1:])], device=device)
        return communicator.maximum_(slowest).item()

    short = seconds(_SMALL, 21)
    size = 2**20
    while (long := seconds(size, 4)) < _LONG_ENOUGH and size < _LARGEST:
        size *= 4
    crossing = 2 * (ranks - 1) / ranks
    messages = 2 * (ranks - 1 if algorithm == "ring" else math.ceil(math.log2(ranks)))
    return Link(crossing * (size - _SMALL) / max(long - short, 1e-9), short / messages)


def measure_processor(device: torch.device | str | None = None) -> Processor:
    """Time `PowerSGD` on one bucket without other ranks, at two ranks and almost without numbers.

    So the rates are those that the compression itself gets, caches, copies and all: three times for three unknowns.

    Args:
        device: an accelerator, if there is one, if ``None``.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    least = _compressing(2, 2, 1, place)
    low, high = (_compressing(_MATRICES, _SIDE, rank, place) for rank in _RANKS)
    numbers = _MATRICES * _SIDE**2
    operations = [_flops(rank) for rank in _RANKS]
    flops_rate = (operations[1] - operations[0]) / max(high - low, 1e-9)
    reading = max(low - least - operations[0] / flops_rate, 0.1 * low)
    return Processor(sum(effort.passes for effort in BOTH) * 4 * numbers / reading, flops_rate, least)


def _flops(rank: int) -> float:
    products = sum(effort.products for effort in BOTH)
    return _MATRICES * (2.0 * products * _SIDE**2 * rank + 4.0 * _SIDE * rank**2)


def _compressing(matrices: int, side: int, rank: int, device: torch.device) -> float:
    """Seconds of a step of `PowerSGD` on square matrices, without the waiting for others."""
    slots = [Slot(str(i), nn.Parameter(torch.empty(side, side, device=device))) for i in range(matrices)]
    reducer = PowerSGD(rank, min_saving=-1e9)
    plan, state = reducer.plan(slots, Place()), State()
    flat = torch.empty(matrices * side**2, device=device)
    segments = list(flat.split(side**2))
    bucket = Bucket([segment.view(side, side) for segment in segments], segments, flat)

    def step() -> None:
        _carry_out(plan, bucket, state)

    times: list[float] = []
    for _ in range(5):
        flat.normal_()
        times.append(_timed(step, device))
    return statistics.median(times[2:])


@torch.no_grad()
def _carry_out(plan: Plan, bucket: Bucket, state: State) -> None:
    reduction = plan.reduce(bucket, state)
    try:
        request = next(reduction)
        while True:
            assert isinstance(request, torch.Tensor)
            request = reduction.send(request)  # the average over one rank
    except StopIteration as returned:
        if returned.value is not None:
            returned.value.commit()
            state.step += 1


def _timed(act: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
