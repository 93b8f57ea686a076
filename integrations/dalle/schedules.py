"""What the settings of both stages have in common: a learning rate that warms up and falls, and checked ranges."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from distopt.errors import SettingError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
    """How a stage is trained.

    Args:
        steps: optimizer steps.
        batch: examples a step, over all ranks.
        learning_rate: the highest one.
        warmup: fraction of the steps in which the learning rate rises linearly; it then falls as a half cosine.
        final_learning_rate: where it ends, as a fraction of ``learning_rate``.
        betas: AdamW's decay rates.
        weight_decay: AdamW's, times the learning rate.
        clip: largest global norm of the gradient.
        averaging: how far back the averaged weights reach, in a unit of the stage's own; 0 keeps the last weights.
        accumulate: micro-batches that each rank cuts its share of a batch into, one after the other, to save memory.

    Raises:
        SettingError: where a value is out of its range.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: float
    final_learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    averaging: float
    accumulate: int = 1

    def __post_init__(self) -> None:
        self.check(("steps", "batch", "accumulate"), is_positive_integer, "an integer of at least 1")
        self.check(("learning_rate", "clip"), lambda value: value > 0, "above 0")
        self.check(("weight_decay",), is_finite_and_not_negative, "a finite number of at least 0")
        self.check(("warmup", "final_learning_rate"), lambda value: 0 <= value <= 1, "from 0 to 1")
        self.check(("averaging",), is_share, "at least 0 and below 1")
        self.check(
            ("betas",),
            lambda value: len(value) == 2 and all(map(is_share, value)),
            "two numbers of at least 0 and below 1",
        )

    def check(self, names: Iterable[str], right: Callable[[Any], bool], allowed: str) -> None:
        """Refuse values for which ``right`` is not true.

        Raises:
            SettingError: names the first of them.
        """
        for name in names:
            if not right(getattr(self, name)):
                raise SettingError(f"{type(self).__name__}.{name}", getattr(self, name), allowed)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0.

        Example:
            >>> rest = dict(batch=1, betas=(0.9, 0.99), weight_decay=0.0, clip=1.0, averaging=0.0)
            >>> settings = StageSettings(steps=100, learning_rate=1.0, warmup=0.1, final_learning_rate=0.0, **rest)
            >>> [round(settings.learning_rate_at(step), 3) for step in (0, 9, 10, 55, 99)]
            [0.1, 1.0, 1.0, 0.5, 0.0]
        """
        warmup = math.ceil(self.warmup * self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        fraction = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * half_cosine(1.0, self.final_learning_rate, fraction)


def is_positive_integer(value: object) -> bool:
    """Whether ``value`` is an integer of at least 1."""
    return isinstance(value, int) and value >= 1


def is_finite_and_not_negative(value: float) -> bool:
    """Whether ``value`` is a finite number of at least 0."""
    return math.isfinite(value) and value >= 0


def is_share(value: float) -> bool:
    """Whether ``value`` is at least 0 and below 1."""
    return 0 <= value < 1


def half_cosine(start: float, end: float, fraction: float) -> float:
    """Go from ``start`` to ``end`` as half a cosine; stay there once ``fraction`` is 1 or more.

    Example:
        >>> [half_cosine(1.0, 0.0, f) for f in (0.0, 0.5, 1.0, 2.0)]
        [1.0, 0.5, 0.0, 0.0]
    """
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, fraction))) / 2
