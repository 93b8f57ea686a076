"""What each block costs: given, measured by the first rank, or taken to be the same."""

import copy
import math
import time
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from distopt.comm.communicator import Communicator
from distopt.errors import AgreementError, SettingError

_REPEATS = 3


def check_costs(costs: object, sample: object, blocks: int) -> list[float] | None:
    """Costs as numbers; ``None`` if there are none.

    Raises:
        SettingError: if they are not one number of at least 0 a block, or all 0, or there is a sample besides; or if
            the sample is no batch.
    """
    if sample is not None and (costs is not None or not isinstance(sample, Tensor) or sample.ndim == 0):
        raise SettingError("sample", type(sample).__name__, "a tensor with a batch dimension, or None; none with costs")
    if costs is None:
        return None
    allowed = f"{blocks} finite numbers of at least 0, one a block, not all 0"
    if not isinstance(costs, Sequence) or isinstance(costs, str) or len(cast(Sequence[object], costs)) != blocks:
        raise SettingError("costs", costs, allowed)
    given = list(cast(Sequence[object], costs))
    if not all(isinstance(c, (int, float)) and math.isfinite(c) and c >= 0 for c in given) or not any(given):
        raise SettingError("costs", costs, allowed)
    return [float(cast(float, cost)) for cost in given]


def agreed_costs(blocks: Sequence[nn.Module], sample: Tensor | None, everyone: Communicator) -> list[float]:
    """The first rank's measured costs, on every rank; all the same if it has no sample. Collective.

    Args:
        blocks: in their order.
        sample: a micro-batch, on the first rank.
        everyone: the ranks.

    Raises:
        AgreementError: if the first rank could not measure.
    """
    found, error = [1.0] * len(blocks), None
    if everyone.rank == 0 and sample is not None:
        try:
            found = measure(blocks, sample)
        except Exception as raised:
            error = raised
    told = everyone.gather_objects((found, error and f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
    costs, failure = told[0]
    if failure is not None:
        rank = everyone.ranks[0]
        raise AgreementError(f"rank {rank} could not measure the blocks: {failure}", [rank]) from error
    return costs


def measure(blocks: Sequence[nn.Module], sample: Tensor) -> list[float]:
    """Time forward and backward of each block on copies, the shortest of three each, after one to warm up.

    Blocks, gradients and random numbers stay as they are.

    Args:
        blocks: in their order.
        sample: a micro-batch, on the blocks' device.

    Returns:
        Seconds.

    Example:
        >>> len(measure([nn.Linear(2, 2), nn.ReLU()], torch.ones(1, 2)))
        2
    """
    devices = [sample.device] if sample.is_cuda else []
    seconds: list[float] = []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        x = sample.detach()
        for block in blocks:
            twin = copy.deepcopy(block)
            times = [_time(twin, x) for _ in range(1 + _REPEATS)]
            seconds.append(min(elapsed for elapsed, _ in times[1:]))
            x = times[-1][1]
    return seconds


def _time(block: nn.Module, x: Tensor) -> tuple[float, Tensor]:
    x = x.clone().requires_grad_(x.is_floating_point())
    begin = _now(x)
    y = block(x)
    if y.requires_grad:
        y.backward(torch.ones_like(y))
    return _now(x) - begin, y.detach()


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
