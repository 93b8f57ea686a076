"""What the settings of both stages have in common: a learning rate that warms up and falls, and checked ranges.

Lengths of schedules are given in one of two ways: a whole number is steps (``5000``), any other number,
from 0 to 1, is a fraction of the run (``0.05``). So ``1`` is one step, and ``1.0`` the whole run. The numbers of the
paper are steps; fractions keep their meaning in a run of another length.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from distopt.errors import SettingError

from ..running.fields import LENGTH, is_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings:
    """How a stage is trained.

    Args:
        steps: optimizer steps.
        batch: examples a step, over all ranks.
        learning_rate: the highest one.
        warmup: length in which the learning rate rises linearly; it then falls as a half cosine.
        final_learning_rate: where it ends, as a fraction of ``learning_rate``.
        decay_steps: length after which it has ended, the warm-up included; it stays there for the rest.
        betas: AdamW's decay rates.
        weight_decay: AdamW's, times the learning rate.
        clip: largest global norm of the gradient; 0 for none.
        averaging: how far back the averaged weights reach, in a unit of the stage's own; 0 keeps the last weights.
        accumulate: micro-batches that each rank cuts its share of a batch into, one after the other, to save memory.

    Raises:
        SettingError: where a value is out of its range.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int | float
    final_learning_rate: float
    decay_steps: int | float = 1.0
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    averaging: float
    accumulate: int = 1

    def __post_init__(self) -> None:
        self.check(("steps", "batch", "accumulate"), is_positive_integer, "an integer of at least 1")
        self.check(("learning_rate",), lambda value: value > 0, "above 0")
        self.check(("weight_decay", "clip"), is_finite_and_not_negative, "a finite number of at least 0")
        self.check(("warmup", "decay_steps"), is_length, LENGTH)
        self.check(("final_learning_rate",), lambda value: 0 <= value <= 1, "from 0 to 1")
        self.check(("averaging",), is_share, "at least 0 and below 1")
        self.check(
            ("betas",),
            lambda value: len(value) == 2 and all(map(is_share, value)),
            "two numbers of at least 0 and below 1",
        )

    @property
    def together(self) -> int:
        """Rows of a batch that are not divided over ranks."""
        return 1

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
        warmup = math.ceil(in_steps(self.warmup, self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        fraction = (step - warmup) / max(1, in_steps(self.decay_steps, self.steps) - warmup)
        return self.learning_rate * half_cosine(1.0, self.final_learning_rate, fraction)


def length_from(text: str) -> int | float:
    """Read a length from a command line: what is written as a whole number is steps.

    Raises:
        ValueError: it is no number.

    Example:
        >>> length_from("5000"), length_from("0.05")
        (5000, 0.05)
    """
    try:
        return int(text)
    except ValueError:
        return float(text)


def in_steps(length: int | float, steps: int) -> int | float:
    """A length as a number of steps, of a run of ``steps``.

    Example:
        >>> in_steps(5000, 100), in_steps(0.5, 100)
        (5000, 50.0)
    """
    return length if isinstance(length, int) else length * steps


def share_of(step: int, length: int | float, steps: int) -> float:
    """Which fraction of a length has passed at ``step``: 1 or more once it is over.

    Example:
        >>> share_of(50, 0.5, 200), share_of(50, 100, 200), share_of(0, 0.0, 200)
        (0.5, 0.5, 1.0)
    """
    if length == 0:
        return 1.0
    return step / length if isinstance(length, int) else step / steps / length


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
