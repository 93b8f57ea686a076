"""Two distorted views of each sample through one network, which learns from itself to answer both alike.

    symbol  here            shape   meaning
    p_a     logits_a        (B, C)  answer to the first view
    h(x_a)  features_a      (B, D)  pooled features of the first view, what the last layer sees
    lambda  agreement               weight of the two divergences
    mu      discrepancy             weight of the distance between the views' mean features

The loss is ``CE(p_a, y) + CE(p_b, y) + lambda (KL(p_a || p_b) + KL(p_b || p_a)) + mu |mean h(x_a) - mean h(x_b)|^2``.
The last term, the maximum mean discrepancy under a linear kernel, compares *means over the batch*: what pairs belong
together does not matter to it.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from distopt.errors import SettingError

MEANS = ("rank", "global")


@dataclasses.dataclass(frozen=True)
class Terms:
    """The five terms, each ``()``, before they are weighted, and their sum.

    Args:
        first: cross-entropy of the first view.
        second: cross-entropy of the second view.
        forwards: KL(p_a || p_b).
        backwards: KL(p_b || p_a).
        discrepancy: squared distance of the views' mean features.
        total: the weighted sum.
    """

    first: Tensor
    second: Tensor
    forwards: Tensor
    backwards: Tensor
    discrepancy: Tensor
    total: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfDistillation:
    """The loss of data-distortion guided self-distillation.

    Args:
        agreement: weight of the two divergences, at least 0.
        discrepancy: weight of the distance between mean features, at least 0.
        temperature: divides the logits within the divergences, which are multiplied by its square; above 0.
        detach: whether the first view of each divergence, the teacher, gets no gradient from it.
        mean: over what features are averaged: "rank", the samples of this rank, or "global", those of all ranks.
        process_group: whose ranks, for "global"; the default group.

    Under DDP "rank" is what a loss written for one process becomes: each rank compares means of its own part of the
    batch, whose noise is larger the smaller the part. With "global" the mean is weighted by each rank's samples, and
    the averaged gradient is that of one process with the whole batch, if ranks have equally many samples, or if the
    loss is given to ``window.backward`` of `distopt.accumulate` times its samples. It costs one all-reduce of 2 D + 1
    numbers in forward, none in backward; all ranks must call it equally often.

    Raises:
        SettingError: where a setting is out of its range.

    Example:
        >>> loss = SelfDistillation()
        >>> logits, features = torch.zeros(2, 4), torch.ones(2, 3)
        >>> terms = loss(logits, logits, features, features, torch.tensor([0, 1]))
        >>> round(terms.total.item(), 4), terms.forwards.item(), terms.discrepancy.item()
        (2.7726, 0.0, 0.0)

    Source: Xu and Liu 2019, Data-Distortion Guided Self-Distillation for Deep Neural Networks (AAAI).
    """

    agreement: float = 1.0
    discrepancy: float = 5e-4
    temperature: float = 1.0
    detach: bool = False
    mean: str = "rank"
    process_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        for name in ("agreement", "discrepancy"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SettingError(f"SelfDistillation.{name}", value, "a finite number of at least 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise SettingError("SelfDistillation.temperature", self.temperature, "a finite number above 0")
        if self.mean not in MEANS:
            raise SettingError("SelfDistillation.mean", self.mean, "one of " + ", ".join(MEANS))

    def __call__(
        self, logits_a: Tensor, logits_b: Tensor, features_a: Tensor, features_b: Tensor, labels: Tensor
    ) -> Terms:
        """The terms for one batch.

        Args:
            logits_a: ``(B, C)`` of the first view; 16-bit numbers are taken to float32.
            logits_b: ``(B, C)`` of the second view.
            features_a: ``(B, D)``, or with further dimensions, which are averaged away.
            features_b: the same of the second view.
            labels: ``(B,)`` int64.

        Raises:
            SettingError: shapes do not fit.
        """
        if logits_a.shape != logits_b.shape or features_a.shape != features_b.shape:
            shapes = [tuple(part.shape) for part in (logits_a, logits_b, features_a, features_b)]
            raise SettingError("the views' logits and features", shapes, "of the same shapes for both views")
        a, b = _full(logits_a), _full(logits_b)
        forwards, backwards = self._divergence(a, b), self._divergence(b, a)
        first, second = functional.cross_entropy(a, labels), functional.cross_entropy(b, labels)
        squared = self._difference(_pooled(features_a), _pooled(features_b)).square().sum()
        total = first + second + self.agreement * (forwards + backwards) + self.discrepancy * squared
        return Terms(first, second, forwards, backwards, squared, total)

    def _divergence(self, teacher: Tensor, student: Tensor) -> Tensor:
        """KL(teacher || student), mean over the batch."""
        p = functional.log_softmax((teacher.detach() if self.detach else teacher) / self.temperature, dim=-1)
        q = functional.log_softmax(student / self.temperature, dim=-1)
        return (p.exp() * (p - q)).sum(-1).mean() * self.temperature**2

    def _difference(self, a: Tensor, b: Tensor) -> Tensor:
        here = a.mean(0) - b.mean(0)
        if self.mean == "rank" or not dist.is_initialized():
            return here
        summed = torch.cat([here.detach() * len(a), here.new_tensor([float(len(a))])])
        dist.all_reduce(summed, group=self.process_group)
        # DDP averages the ranks' gradients: with the derivative of this rank's own mean alone, that average is the
        # derivative of the mean over all ranks.
        return here + (summed[:-1] / summed[-1] - here).detach()


def both_views(
    model: Callable[[Tensor], tuple[Tensor, Tensor]], first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run both views through ``model`` in one forward pass, as DDP wants it.

    Args:
        model: gives logits ``(n, C)`` and features ``(n, D)`` of n samples.
        first: ``(B, ...)``.
        second: ``(B, ...)``.

    Returns:
        What `SelfDistillation` is called with: logits and features of both views. Without batch norms they are what two
        passes would give; a batch norm sees both views at once.

    Raises:
        SettingError: the views are of different shapes.
    """
    if first.shape != second.shape:
        raise SettingError("the views", [tuple(first.shape), tuple(second.shape)], "of the same shape")
    logits, features = model(torch.cat([first, second]))
    of_logits, of_features = logits.tensor_split(2), features.tensor_split(2)
    return of_logits[0], of_logits[1], of_features[0], of_features[1]


def _full(numbers: Tensor) -> Tensor:
    return numbers if numbers.dtype == torch.float64 else numbers.float()


def _pooled(features: Tensor) -> Tensor:
    return _full(features).flatten(2).mean(-1) if features.dim() > 2 else _full(features)
