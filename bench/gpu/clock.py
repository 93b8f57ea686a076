"""Times of what runs on a GPU: events around it, data drawn at random, caches cold, fresh memory full of NaN."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

_FLUSHED = 2**28
"""Bytes that are written between runs: more than any second-level cache holds."""
LEAST_RUNS, MOST_RUNS = 5, 100
_SLOW = 300.0
"""Milliseconds."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds of many runs.

    Args:
        ms: their median.
        low: lower quartile.
        high: upper quartile.
        runs: how many.
    """

    ms: float
    low: float
    high: float
    runs: int


class Clock:
    """Runs things again and again on a device, and takes their time.

    Args:
        device: ``cuda``, or ``cpu`` for a dry run, whose times mean nothing.
        seconds: to spend on one thing, all runs together.
    """

    def __init__(self, device: torch.device, seconds: float = 0.7) -> None:
        self.device = device
        self._seconds = seconds
        self._cuda = device.type == "cuda"
        self._flushed = torch.empty(_FLUSHED if self._cuda else 8, dtype=torch.uint8, device=device)

    def time(self, run: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> Times:
        """Give the median of many runs, after some that are not counted.

        Args:
            run: what is timed.
            prepare: what is done before each run, and is not.
        """
        warm = self._once(run, prepare)
        if warm < _SLOW:
            warm = [self._once(run, prepare) for _ in range(2)][-1]
        count = int(min(MOST_RUNS, max(LEAST_RUNS, 1e3 * self._seconds / max(warm, 1e-3))))
        if warm >= _SLOW:  # what takes so long has lost, whatever its spread
            count = 2
        found = [self._once(run, prepare) for _ in range(count)]
        low, middle, high = statistics.quantiles(found, n=4)
        return Times(middle, low, high, count)

    def poison(self, nbytes: int) -> None:
        """Fill memory with NaN and let it go, so that whatever is made next begins with it."""
        torch.full((max(1, nbytes // 4),), float("nan"), device=self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._cuda:
            torch.cuda.synchronize()

    def _once(self, run: Callable[[], object], prepare: Callable[[], object]) -> float:
        prepare()
        self._flushed.fill_(1)
        if not self._cuda:
            began = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - began)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        # The host is let ahead, as it is in training: a launch is not what is timed, unless launches are the bound.
        self._flushed.fill_(1)
        events[0].record()
        run()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1])

    def peak(self, run: Callable[[], object]) -> int | None:
        """Bytes that a run takes beyond what there is before it; ``None`` on a CPU."""
        if not self._cuda:
            run()
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def relative(found: Tensor, wanted: Tensor) -> float:
    """``|found - wanted| / |wanted|``, in float64 by pieces; NaN stays NaN.

    Example:
        >>> relative(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
        1.0
    """
    difference, size = 0.0, 0.0
    for mine, theirs in zip(found.flatten().split(2**26), wanted.flatten().split(2**26), strict=True):
        difference += float((mine.double() - theirs.double()).square().sum())
        size += float(theirs.double().square().sum())
    return (difference / size) ** 0.5 if size else difference**0.5
