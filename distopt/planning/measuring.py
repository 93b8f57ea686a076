"""A link and a processor, timed in a second or two: where `plan` is not told their rates."""

import dataclasses
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
from distopt.planning.overheads import measure_overheads
from distopt.reducers.powersgd import PowerSGD
from distopt.reducers.reducer import Bucket, Place, Plan, Slot, State

_SIDE, _MATRICES, _RANKS = 1280, 4, (4, 64)
"""Together as large as one of DDP's buckets."""
_TINY, _MANY = 64, 16
"""Side and number of matrices of which there is little to compute but much to do."""
_REPETITIONS = 9
_SMALL, _LARGEST = 1024, 64 * 2**20
_LONG_ENOUGH = 0.2
"""Seconds that an all-reduce should take to tell the rate of the link."""


class Link(NamedTuple):
    """What a link takes.

    Args:
        bandwidth: bytes a second out of a rank.
        latency: seconds of a message.
        cpu_seconds_per_byte: processor time of a rank for each byte that it sends.
    """

    bandwidth: float
    latency: float
    cpu_seconds_per_byte: float = 0.0


def measure(process_group: dist.ProcessGroup | None = None, algorithm: Algorithm = "tree") -> tuple[Link, Processor]:
    """Time the link between the ranks and what this machine computes, in a few seconds. Collective.

    What comes back is what `plan` takes as ``bandwidth``, ``latency``, ``cpu_seconds_per_byte``, ``memory_rate``,
    ``flops_rate``, ``bucket_seconds`` and ``matrix_seconds``. Without an accelerator, the last two are timed in
    training steps. All ranks compute at the same time, as they do in a step.

    Args:
        process_group: of the ranks; the default one if ``None``.
        algorithm: as for `plan`: of how many messages the latency is that of one.

    Raises:
        SettingError: if there is no process group.
    """
    link, processor = measure_link(process_group, algorithm), measure_processor()
    if dist.get_world_size(process_group) > 1 and not torch.cuda.is_available():
        processor = dataclasses.replace(processor, **measure_overheads(process_group)._asdict())
    return link, processor


def measure_link(process_group: dist.ProcessGroup | None = None, algorithm: Algorithm = "tree") -> Link:
    """Time all-reduces of two sizes: what the larger takes longer tells the rate. Collective; see `measure`.

    The processor's part is what this process, with the backend's threads, has had of it meanwhile.

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

    def seconds(nbytes: int, repetitions: int) -> tuple[float, float]:
        """On the wall and of the processor, of the slowest rank."""
        payload = torch.zeros(nbytes // 4, device=device)
        times: list[tuple[float, float]] = []
        for _ in range(1 + repetitions):
            before = time.process_time()
            times.append((_timed(lambda: communicator.average_(payload), device), time.process_time() - before))
        medians = [statistics.median(column) for column in zip(*times[1:], strict=True)]
        slowest = communicator.maximum_(torch.tensor(medians, device=device)).tolist()
        return slowest[0], slowest[1]

    short, _ = seconds(_SMALL, 20)
    size = 2**20
    while (long := seconds(size, 5))[0] < _LONG_ENOUGH and size < _LARGEST:
        size *= 4
    crossing = 2 * (ranks - 1) / ranks
    messages = 2 * (ranks - 1 if algorithm == "ring" else math.ceil(math.log2(ranks)))
    # An accelerator is not kept from computing by a processor that sends.
    computing = 0.0 if device.type == "cuda" else long[1] / (crossing * size)
    return Link(crossing * (size - _SMALL) / max(long[0] - short, 1e-9), short / messages, computing)


def measure_processor(device: torch.device | str | None = None) -> Processor:
    """Time `PowerSGD` on buckets without other ranks: large matrices at two ranks, and one and many tiny ones.

    So the rates are those that the compression itself gets, caches, copies and all: four times for four unknowns. They
    are taken in turn, so that whatever else the machine does meets all of them.

    Args:
        device: an accelerator, if there is one, if ``None``.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    shapes = [(1, _TINY), (_MANY, _TINY), (_MATRICES, _SIDE), (_MATRICES, _SIDE)]
    steps = [_compressing(*shape, rank, place) for shape, rank in zip(shapes, (4, 4, *_RANKS), strict=True)]
    times = [[step() for step in steps] for _ in range(2 + _REPETITIONS)][2:]
    # The quickest quarter: what else the machine does now makes steps slower, never faster.
    one, many, low, high = (statistics.quantiles(column, method="inclusive")[0] for column in zip(*times, strict=True))
    matrix = max(0.0, many - one) / (_MANY - 1)
    bucket = max(0.0, one - matrix)
    numbers = _MATRICES * _SIDE**2
    operations = [_flops(rank) for rank in _RANKS]
    flops_rate = (operations[1] - operations[0]) / max(high - low, 0.1 * high)
    reading = max(low - bucket - _MATRICES * matrix - operations[0] / flops_rate, 0.1 * low)
    memory_rate = sum(effort.passes for effort in BOTH) * 4 * numbers / reading
    return Processor(memory_rate, flops_rate, bucket, matrix)


def _flops(rank: int) -> float:
    products = sum(effort.products for effort in BOTH)
    return _MATRICES * (2.0 * products * _SIDE**2 * rank + 4.0 * _SIDE * rank**2)


def _compressing(matrices: int, side: int, rank: int, device: torch.device) -> Callable[[], float]:
    """A step of `PowerSGD` on square matrices, without the waiting for others: its seconds, whenever it is called."""
    slots = [Slot(str(i), nn.Parameter(torch.empty(side, side, device=device))) for i in range(matrices)]
    plan, state = PowerSGD(rank, min_saving=-1e9).plan(slots, Place()), State()
    flat = torch.empty(matrices * side**2, device=device)
    segments = list(flat.split(side**2))
    bucket = Bucket([segment.view(side, side) for segment in segments], segments, flat)

    # A processor with one thread tells what it has had of it, whatever else the machine does.
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def seconds() -> float:
        flat.normal_()
        return _timed(lambda: _carry_out(plan, bucket, state), device, clock)

    return seconds


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


def _timed(act: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = clock()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began
