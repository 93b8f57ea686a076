"""What a bucket and a matrix take whatever their size, timed in training steps: the interpreter's work, mostly.

Timed by itself, over and over, it takes a fraction of that: here as in a step, everything is out of the caches and goes
through DDP's hook, the worker's thread and the collectives.
"""

import statistics
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from distopt.attach.register import register
from distopt.comm.communicator import Communicator
from distopt.reducers.powersgd import PowerSGD

_SIDE, _RANK, _MATRICES, _BUCKETS = 64, 4, 16, 8
_SCRATCH = 2**23
_WARM_UP, _STEPS = 4, 15


class Overheads(NamedTuple):
    """Processor seconds of a rank for each bucket, and for each matrix that is compressed."""

    bucket_seconds: float
    matrix_seconds: float


def measure_overheads(process_group: dist.ProcessGroup | None = None) -> Overheads:
    """Train tiny matrices under `PowerSGD`, and under a hook that does nothing, in turn. Collective; for processors.

    One matrix, several in one bucket, and these in several buckets tell the constants apart; what a step takes once is
    divided among the last ones' buckets. Of the processor's time, not on the wall: waiting is the network's part.

    Args:
        process_group: of the ranks; the default one if ``None``.
    """
    layouts = [(1, 1), (_MATRICES, 1), (_MATRICES, _BUCKETS)]
    models = {(*layout, works): _model(*layout, works, process_group) for layout in layouts for works in (False, True)}
    taken: dict[tuple[int, int, bool], list[float]] = {key: [] for key in models}
    rows, scratch = torch.randn(4, _SIDE), torch.zeros(_SCRATCH)
    together = Communicator(process_group or dist.distributed_c10d._get_default_group())  # pyright: ignore
    for _ in range(_WARM_UP + _STEPS):
        for key, model in models.items():
            scratch.add_(1)  # leaves nothing else in the caches
            together.gather_numbers([0.0])
            taken[key].append(_step(model, rows))
    medians = {key: statistics.median(seconds[_WARM_UP:]) for key, seconds in taken.items()}
    one, many, divided = (medians[*layout, True] - medians[*layout, False] for layout in layouts)
    matrix = max(0.0, many - one) / (_MATRICES - 1)
    return Overheads(max(0.0, divided - _MATRICES * matrix) / _BUCKETS, matrix)


def _model(matrices: int, buckets: int, works: bool, process_group: dist.ProcessGroup | None) -> nn.Module:
    model = nn.Sequential(*[nn.Linear(_SIDE, _SIDE, bias=False) for _ in range(matrices)])
    megabytes = 4 * _SIDE**2 * (matrices // buckets - 0.5) / 2**20
    ddp = DistributedDataParallel(model, process_group=process_group, bucket_cap_mb=megabytes)
    if works:
        register(ddp, PowerSGD(_RANK))
    else:
        ddp.register_comm_hook(None, noop_hook)
    return ddp


def _step(model: nn.Module, rows: Tensor) -> float:
    model.zero_grad(set_to_none=True)
    before = time.process_time()
    model(rows).sum().backward()
    return time.process_time() - before
