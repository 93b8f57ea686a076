"""How a gradient scale follows its branch: pure state machines, for any number of scales at once.

Scales are kept as logarithms to base 2, "octaves". Nothing here reads a value on the host.
"""

import abc
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from distopt.errors import SettingError

Preset: TypeAlias = Literal["default", "paper"]


class Scales(NamedTuple):
    """The state of n scales, each tensor ``(n,)``."""

    log2: Tensor  # float64: the scale itself
    peak: Tensor  # float64: log2 of the largest unscaled gradient of late, -inf before the first
    margin: Tensor  # float64: octaves to stay further from overflow than the peak calls for
    fallen: Tensor  # float64: octaves that the scale fell in the non-finite steps up to now
    bad: Tensor  # int64: non-finite steps in a row
    since: Tensor  # int64: updates since the last division


class ScalePolicy(abc.ABC):
    """How scales change from step to step. Concrete policies are frozen dataclasses, and pure."""

    @abc.abstractmethod
    def start(self, count: int, replicas: int = 1, device: torch.device | None = None) -> Scales:
        """Give the state before the first step.

        Args:
            count: number of scales.
            replicas: ranks whose gradients are added up.
            device: where the state is to live.
        """

    @abc.abstractmethod
    def update(self, scales: Scales, peaks: Tensor, top: float, replicas: int = 1) -> Scales:
        """Give the state after a step.

        Args:
            scales: before it.
            peaks: float ``(n,)``, the largest absolute value of each branch's scaled parameter gradients; infinite
                if one was not finite, 0 if there were none.
            top: log2 of the largest number of the 16-bit format.
            replicas: as for `start`.
        """

    @abc.abstractmethod
    def lowest(self, replicas: int = 1) -> float:
        """Give the lower bound of a scale, in octaves."""


@dataclass(frozen=True)
class PaperPolicy(ScalePolicy):
    """The rule of DALL-E: creep up while all is finite, step down when it is not, but not twice in a row.

    The constants are for a loss that is divided by the batch of all replicas, whose gradients are added up; for a
    loss divided by each rank's own batch, as is usual with DDP, gradients are larger by the number of replicas.

    Source: Ramesh et al. 2021 (arXiv:2102.12092), section 2.4 and appendix D.1.

    Args:
        initial: octaves at the start, a replica.
        growth: octaves up on a clean step.
        backoff: octaves down on a non-finite one.
        window: updates from one division to the next of the same scale, at least.
        low: lower bound in octaves, a replica.
        high: upper bound in octaves, a replica.

    Example:
        >>> policy = PaperPolicy()
        >>> scales = policy.start(2)
        >>> policy.update(scales, torch.tensor([1.0, float("inf")]), top=16.0).log2.tolist()
        [13.001, 12.5]
    """

    initial: float = 13.0
    growth: float = 1 / 1000
    backoff: float = 0.5
    window: int = 125
    low: float = 7.0
    high: float = 24.0

    def __post_init__(self) -> None:
        _check_bounds("PaperPolicy", self.low, self.initial, self.high)
        _check_at_least("PaperPolicy", growth=self.growth, backoff=self.backoff, window=self.window)

    def start(self, count: int, replicas: int = 1, device: torch.device | None = None) -> Scales:
        """See `ScalePolicy.start`."""
        scales = _start(count, self.initial + math.log2(replicas), device)
        return scales._replace(since=scales.since + self.window)

    def update(self, scales: Scales, peaks: Tensor, top: float, replicas: int = 1) -> Scales:
        """See `ScalePolicy.update`."""
        finite = torch.isfinite(peaks)
        divide = ~finite & (scales.since >= self.window)
        step = self.growth * finite.double() - self.backoff * divide.double()
        offset = math.log2(replicas)
        return scales._replace(
            log2=(scales.log2 + step).clamp(self.low + offset, self.high + offset),
            bad=torch.where(finite, 0, scales.bad + 1),
            since=torch.where(divide, 1, scales.since + 1),
        )

    def lowest(self, replicas: int = 1) -> float:
        """See `ScalePolicy.lowest`."""
        return self.low + math.log2(replicas)


@dataclass(frozen=True)
class HeadroomPolicy(ScalePolicy):
    """Keep the largest parameter gradient of late some octaves below overflow, and learn from overflows besides.

    Where the paper's rule finds the right scale by overflowing now and then, this one measures it: after one clean
    step it is there. An overflow lowers the scale, several in a row faster and faster. If the gradients of the next
    clean step are not larger by as much, something else has overflowed, activations for example: so much more room is
    left from then on, which comes back as slowly as in the paper.

    Args:
        initial: octaves at the start.
        headroom: octaves from the largest gradient to overflow.
        memory: steps in which the largest gradient that is remembered loses an octave.
        growth: octaves of the additional room that come back on a clean step.
        low: lower bound in octaves.
        high: upper bound in octaves.

    Example:
        >>> policy = HeadroomPolicy()
        >>> policy.update(policy.start(2), torch.tensor([1.0, float("inf")]), top=16.0).log2.tolist()
        [25.0, 12.0]
    """

    initial: float = 13.0
    headroom: float = 4.0
    memory: int = 16
    growth: float = 1 / 1000
    low: float = -40.0
    high: float = 60.0

    def __post_init__(self) -> None:
        _check_bounds("HeadroomPolicy", self.low, self.initial, self.high)
        _check_at_least("HeadroomPolicy", growth=self.growth, headroom=self.headroom, memory=self.memory)

    def start(self, count: int, replicas: int = 1, device: torch.device | None = None) -> Scales:
        """See `ScalePolicy.start`. The measured scale does not depend on the number of replicas."""
        return _start(count, self.initial, device)

    def update(self, scales: Scales, peaks: Tensor, top: float, replicas: int = 1) -> Scales:
        """See `ScalePolicy.update`."""
        finite, known = torch.isfinite(peaks), torch.isfinite(scales.peak)
        fall = torch.exp2(scales.bad.clamp(max=3).double())
        seen = peaks.double().log2() - scales.log2.floor()  # -inf for a gradient of zeros
        unexplained = (scales.fallen - (seen - scales.peak).clamp(min=0)).clamp(min=0)
        relaxed = (scales.margin - self.growth).clamp(min=0) + torch.where(known, unexplained, 0)
        margin = torch.where(finite, relaxed, scales.margin)
        peak = torch.where(finite, torch.maximum(seen, scales.peak - 1 / self.memory), scales.peak)
        fallen = torch.where(finite, 0, scales.fallen + fall)
        # Before there was any gradient, the scale stays where it is or falls.
        search = scales.log2 - torch.where(finite, 0, fall)
        wanted = torch.where(torch.isfinite(peak), top - self.headroom - margin - fallen - peak, search)
        return Scales(
            log2=wanted.clamp(self.low, self.high),
            peak=peak,
            margin=margin,
            fallen=fallen,
            bad=torch.where(finite, 0, scales.bad + 1),
            since=torch.where(finite, scales.since + 1, 1),
        )

    def lowest(self, replicas: int = 1) -> float:
        """See `ScalePolicy.lowest`."""
        return self.low


def policy_of(preset: Preset | ScalePolicy) -> ScalePolicy:
    """Give the policy that a preset names, or the one given.

    Raises:
        SettingError: if it is neither.

    Example:
        >>> policy_of("paper")
        PaperPolicy(initial=13.0, growth=0.001, backoff=0.5, window=125, low=7.0, high=24.0)
    """
    if isinstance(preset, ScalePolicy):
        return preset
    if preset not in ("default", "paper"):
        raise SettingError("preset", preset, '"default", "paper" or a policy such as PaperPolicy(window=10)')
    return PaperPolicy() if preset == "paper" else HeadroomPolicy()


def _start(count: int, initial: float, device: torch.device | None) -> Scales:
    octaves = torch.full((count,), initial, dtype=torch.float64, device=device)
    nothing, counts = torch.zeros_like(octaves), torch.zeros(count, dtype=torch.int64, device=device)
    unknown = torch.full_like(octaves, -math.inf)
    return Scales(octaves, unknown, nothing, nothing.clone(), counts, counts.clone())


def _check_bounds(name: str, low: float, initial: float, high: float) -> None:
    if not (-100 <= low <= initial <= high <= 100):
        raise SettingError(f"{name}.initial", initial, f"between low ({low}) and high ({high}), all from -100 to 100")


def _check_at_least(name: str, **values: float) -> None:
    for field, value in values.items():
        least = 1 if isinstance(value, int) else 0
        if not (math.isfinite(value) and value >= least):
            raise SettingError(f"{name}.{field}", value, f"a number of at least {least}")
