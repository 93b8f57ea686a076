"""From the instances of a bag to the bag: what a bag's probability is, given those of its instances.

Symbols::

    symbol  here        shape      meaning
    z       logits      (B, N, C)  log-odds of each instance, N the largest bag's
            mask        (B, N)     True where there is an instance, for bags of different sizes
    p                   (B, N, C)  sigmoid(z)
    P                   (B, C)     the bag's probability; what a pooling returns is its log-odds

Every pooling goes from log-odds to log-odds, so that ``binary_cross_entropy_with_logits`` takes what it gives; inside,
probabilities are their logarithms, in float32 under autocast, and a bag of a thousand sure instances has a finite loss
and gradient.
"""

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from distopt.errors import SettingError

from .clamping import clamped
from .logspace import log1mexp, log_expm1, log_softplus, masked_logmeanexp, masked_logsumexp
from .masks import check_count, checked_mask

KINDS = ("noisy-and", "noisy-or", "isr", "lse", "max", "mean")
"""What `pooling` makes; attention pools features instead, see `attention`."""


class Pooling(nn.Module, abc.ABC):
    """Instances' log-odds to bags' log-odds; its kinds are the classes below, and `pooling` makes one by its name."""

    def forward(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool over instances.

        Args:
            logits: ``(B, N, C)``; what lies outside of the mask does not matter, NaN included.
            mask: ``(B, N)`` bool; all are instances if ``None``.

        Returns:
            ``(B, C)``, the log-odds of each bag, float32 or float64.

        Raises:
            SettingError: shapes do not fit, or a bag has no instance.
        """
        mask = checked_mask(logits, mask)
        full = logits if logits.dtype == torch.float64 else logits.float()
        with torch.autocast(logits.device.type, enabled=False):
            return self.pool(full.masked_fill(~mask.unsqueeze(-1), 0.0), mask)

    @abc.abstractmethod
    def pool(self, z: Tensor, mask: Tensor) -> Tensor:
        """What `forward` does with log-odds that are finite outside of the mask, and a mask that fits."""


class NoisyAnd(Pooling):
    """On when a large enough fraction of the instances is: a sigmoid of their mean, through (0, 0) and (1, 1).

    ``P = (sigmoid(a (m - b)) - sigmoid(-a b)) / (sigmoid(a (1 - b)) - sigmoid(-a b))``, m the mean of p.

    Args:
        classes: how many; each learns its own b, ``threshold``, clamped to [0, 1].
        slope: a, above 0; it is not learned.
        start: b at the start, from 0 to 1.

    Raises:
        SettingError: where a setting is out of its range.

    Example:
        >>> curve = NoisyAnd(1).curve(torch.tensor([[0.0], [0.25], [0.5], [1.0]]))
        >>> [round(value, 4) for value in curve.flatten().tolist()]
        [0.0, 0.0701, 0.5, 1.0]

    Source: Kraus, Ba and Frey 2016 (arXiv:1511.05286).
    """

    def __init__(self, classes: int, *, slope: float = 10.0, start: float = 0.5) -> None:
        super().__init__()
        check_count("NoisyAnd.classes", classes)
        if not (math.isfinite(slope) and slope > 0):
            raise SettingError("NoisyAnd.slope", slope, "a finite number above 0")
        if not 0 <= start <= 1:
            raise SettingError("NoisyAnd.start", start, "a number from 0 to 1")
        self.slope = slope
        self.threshold = nn.Parameter(torch.full((classes,), float(start)))
        """``(C,)``; what is outside of [0, 1] counts as the nearer end, and a gradient that leads further out as 0."""

    def pool(self, z: Tensor, mask: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        if z.shape[-1] != len(self.threshold):
            raise SettingError("the shape of instances", tuple(z.shape), f"(bags, instances, {len(self.threshold)})")
        a, b = self.slope, self._clamped(z)
        log_m = masked_logmeanexp(functional.logsigmoid(z), mask)
        log_rest = masked_logmeanexp(functional.logsigmoid(-z), mask)
        # sigmoid(u) - sigmoid(v) = sigmoid(u) sigmoid(-v) (1 - exp(v - u)), in the numerator of P and that of 1 - P.
        inside = a * (log_m.exp() - b) + functional.logsigmoid(a * b) - functional.logsigmoid(a * (1 - b))
        return inside + self._rise(log_m) - self._rise(log_rest)

    def curve(self, mean: Tensor) -> Tensor:
        """P by the formula itself, of means ``(..., C)`` from 0 to 1."""
        a, b = self.slope, self._clamped(mean)
        low = torch.sigmoid(-a * b)
        return (torch.sigmoid(a * (mean - b)) - low) / (torch.sigmoid(a * (1 - b)) - low)

    def _rise(self, log_mean: Tensor) -> Tensor:
        """``ln(1 - exp(-a mean))``."""
        tiny = log_mean + math.log(self.slope) < -15.0
        kept = torch.where(tiny, 0.0, log_mean)
        close = log_mean + math.log(self.slope)
        return torch.where(tiny, close, log1mexp(-self.slope * kept.exp()))

    def _clamped(self, like: Tensor) -> Tensor:
        return clamped(self.threshold, 0.0, 1.0).to(like.dtype)


class NoisyOr(Pooling):
    """On when one instance is: ``P = 1 - product of (1 - p)``. One sure instance decides, and many unsure ones do.

    Example:
        >>> round(NoisyOr()(torch.zeros(1, 2, 1)).sigmoid().item(), 6)
        0.75
    """

    def pool(self, z: Tensor, mask: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        # 1 - P = exp(-t), t the sum of softplus(z): log-odds ln(exp(t) - 1).
        log_t = masked_logsumexp(log_softplus(z), mask)
        return log_expm1(log_t.exp(), log_t)


class ISR(Pooling):
    """Integrated segmentation and recognition: ``P = v / (1 + v)``, v the sum of the odds ``p / (1 - p)``.

    Example:
        >>> round(ISR()(torch.zeros(1, 3, 1)).sigmoid().item(), 6)
        0.75

    Source: Keeler, Rumelhart and Leow 1991 (NIPS 3), as named in arXiv:1511.05286.
    """

    def pool(self, z: Tensor, mask: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        return masked_logsumexp(z, mask)


class LogSumExp(Pooling):
    """A smooth maximum: ``P = ln(mean of exp(r p)) / r``, the mean as r goes to 0, the maximum as it grows.

    Args:
        sharpness: r, above 0.

    Raises:
        SettingError: it is not.

    Example:
        >>> round(LogSumExp()(torch.zeros(1, 3, 1)).sigmoid().item(), 6)
        0.5

    Source: Ramon and De Raedt 2000, as named in arXiv:1511.05286.
    """

    def __init__(self, *, sharpness: float = 5.0) -> None:
        super().__init__()
        if not (math.isfinite(sharpness) and sharpness > 0):
            raise SettingError("LogSumExp.sharpness", sharpness, "a finite number above 0")
        self.sharpness = sharpness

    def pool(self, z: Tensor, mask: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        r = self.sharpness
        log_p, log_q = functional.logsigmoid(z), functional.logsigmoid(-z)
        # r P = ln(1 + mean(exp(r p) - 1)), and r (1 - P) = -ln(mean(exp(-r q))) = -ln(1 - mean(1 - exp(-r q))).
        rise = masked_logmeanexp(log_expm1(r * log_p.exp(), log_p + math.log(r)), mask)
        rest = -masked_logmeanexp(-r * log_q.exp(), mask)
        small = rest < 0.5
        fall = masked_logmeanexp(_log_fall(r * log_q.exp(), log_q + math.log(r)), mask)
        log_rest = torch.where(
            small, _log_of_minus_log1mexp(torch.where(small, fall, -1.0)), torch.where(small, 1.0, rest).log()
        )
        return log_softplus(rise) - log_rest


class Max(Pooling):
    """The surest instance: ``P = max p``.

    Example:
        >>> Max()(torch.tensor([[[1.0], [3.0]]])).item()
        3.0
    """

    def pool(self, z: Tensor, mask: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        return z.masked_fill(~mask.unsqueeze(-1), -math.inf).amax(1)


class Mean(Pooling):
    """The mean of the instances' probabilities.

    Example:
        >>> round(Mean()(torch.tensor([[[-1.0], [1.0]]])).sigmoid().item(), 6)
        0.5
    """

    def pool(self, z: Tensor, mask: Tensor) -> Tensor:
        """See `Pooling.forward`."""
        log_p, log_q = functional.logsigmoid(z), functional.logsigmoid(-z)
        return masked_logmeanexp(log_p, mask) - masked_logmeanexp(log_q, mask)


def pooling(kind: str, classes: int) -> Pooling:
    """Make a pooling with its defaults.

    Args:
        kind: one of `KINDS`.
        classes: how many.

    Raises:
        SettingError: there is no such kind.

    Example:
        >>> pooling("noisy-or", classes=3)
        NoisyOr()
    """
    makers: dict[str, Callable[[], Pooling]] = {
        "noisy-and": lambda: NoisyAnd(classes), "noisy-or": NoisyOr, "isr": ISR, "lse": LogSumExp, "max": Max,
        "mean": Mean,
    }  # fmt: skip
    if kind not in makers:
        raise SettingError("kind", kind, "one of " + ", ".join(KINDS))
    return makers[kind]()


def _log_fall(x: Tensor, log_x: Tensor) -> Tensor:
    """``ln(1 - exp(-x))`` for x above 0, of which the logarithm is known."""
    tiny = log_x < -15.0
    return torch.where(tiny, log_x - x / 2, log1mexp(-torch.where(tiny, 1.0, x)))


def _log_of_minus_log1mexp(v: Tensor) -> Tensor:
    """``ln(-ln(1 - exp(v)))`` for v below 0."""
    tiny = v < -15.0
    kept = torch.where(tiny, -1.0, v)
    return torch.where(tiny, v + torch.exp(torch.where(tiny, v, -15.0)) / 2, torch.log(-log1mexp(kept)))
