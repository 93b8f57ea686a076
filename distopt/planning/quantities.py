"""Rates and times as people write them. Loads no torch, so that a command can refuse nonsense at once."""

import math
import re
from collections.abc import Mapping
from fractions import Fraction

from distopt.errors import SettingError

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+|inf)\s*([a-zA-Z/]*)\s*")
_PREFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_RATES = {
    prefix + unit: Fraction(factor, 1 if unit.startswith("B") else 8)
    for prefix, factor in _PREFIXES.items()
    for unit in ("B", "B/s", "bit", "bit/s", "bps")
} | {"": Fraction(1)}
_TIMES = {unit: Fraction(1, parts) for unit, parts in {"": 1, "s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}.items()}


def bytes_per_second(field: str, value: float | str) -> float:
    """Read a rate.

    Args:
        field: what the setting is called, for the message.
        value: bytes a second, or text with a unit: bits (``"10Gbit"``, ``"800 Mbit/s"``, ``"25Gbps"``) or bytes
            (``"1.25GB"``, ``"3.35TB/s"``). ``"inf"`` for a link that takes no time.

    Raises:
        SettingError: if it is no rate above 0.

    Example:
        >>> bytes_per_second("bandwidth", "10Gbit"), bytes_per_second("bandwidth", "1.25GB/s")
        (1250000000.0, 1250000000.0)
    """
    allowed = "a rate above 0: bytes a second, or text as '10Gbit' or '1.25GB'"
    rate = _read(field, value, _RATES, allowed)
    if not rate > 0:
        raise SettingError(field, value, allowed)
    return rate


def seconds(field: str, value: float | str) -> float:
    """Read a time.

    Args:
        field: what the setting is called, for the message.
        value: seconds, or text with a unit: ``"20us"``, ``"1.5ms"``, ``"2s"``.

    Raises:
        SettingError: if it is no finite time of at least 0.

    Example:
        >>> seconds("latency", "20us"), seconds("compute_seconds", 0.25)
        (2e-05, 0.25)
    """
    allowed = "a time of at least 0: seconds, or text as '20us' or '1.5ms'"
    time = _read(field, value, _TIMES, allowed)
    if not 0 <= time < math.inf:
        raise SettingError(field, value, allowed)
    return time


def flops(field: str, value: float | str) -> float:
    """Read a number of operations a second, above 0: a number, or text as ``"50T"`` or ``"300 GFLOPS"``.

    Raises:
        SettingError: if it is none.

    Example:
        >>> flops("flops_rate", "50TFLOPS")
        50000000000000.0
    """
    allowed = "operations a second, above 0: a number, or text as '50T'"
    factors = {
        prefix + unit: Fraction(factor) for prefix, factor in _PREFIXES.items() for unit in ("", "FLOPS", "FLOPs")
    }
    rate = _read(field, value, factors, allowed)
    if not rate > 0:
        raise SettingError(field, value, allowed)
    return rate


def _read(field: str, value: float | str, units: Mapping[str, Fraction], allowed: str) -> float:
    try:
        if isinstance(value, str):
            found = _NUMBER.fullmatch(value)
            if found is None or found[2] not in units:
                raise SettingError(field, value, allowed)
            number = _times(found[1], units[found[2]])
        else:
            if isinstance(value, bool) or not isinstance(value, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise SettingError(field, value, allowed)
            number = float(value)
    except OverflowError:
        raise SettingError(field, value, allowed) from None
    if math.isnan(number):
        raise SettingError(field, value, allowed)
    return number


def _times(text: str, factor: Fraction) -> float:
    """A number in a unit, rounded once.

    Raises:
        OverflowError: if it is beyond the range of a float.
    """
    near = float(text)
    if math.isinf(near) and text != "inf":
        raise OverflowError
    # As a fraction, ten to the power of a great exponent would take all memory.
    return near if math.isinf(near) or near == 0 else float(Fraction(text) * factor)


def in_words(time: float) -> str:
    """A time as a table shows it.

    Example:
        >>> in_words(0.0000123), in_words(0.0456), in_words(12.3)
        ('12.3 us', '45.6 ms', '12.3 s')
    """
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if time >= factor:
            return f"{time / factor:.3g} {unit}" if time < 1000 * factor else f"{time / factor:,.0f} {unit}"
    return f"{time / 1e-6:.3g} us" if time > 0 else "0"


def bytes_in_words(count: float) -> str:
    """A number of bytes as a table shows it.

    Example:
        >>> bytes_in_words(24_190_959_616), bytes_in_words(560_000), bytes_in_words(12)
        ('24.2 GB', '560 kB', '12 B')
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.3g} B"
