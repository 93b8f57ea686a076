"""Checks that settings of several reducers share."""

import math


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer; ``True`` and ``False`` are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number other than NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def is_fraction(value: object) -> bool:
    """Whether ``value`` is a number in (0, 1]."""
    return is_number(value) and 0 < value <= 1  # type: ignore[reportOperatorIssue]


def count_of(fraction: float, numel: int) -> int:
    """How many numbers a fraction of ``numel`` is: to the nearest, at least one."""
    return max(1, round(fraction * numel))
