"""Bottlenecks by name: one setting chooses what an autoencoder, or stage 1 of a DALL-E, is built with."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from distopt.errors import SettingError

from .bottleneck import Bottleneck
from .ema import EMA
from .fsq import FSQ
from .gaussian import Gaussian
from .lfq import LFQ
from .relaxed import Relaxed
from .simvq import SimVQ
from .vq import VQ

KINDS: Mapping[str, Callable[..., Bottleneck]] = {
    "gaussian": Gaussian,
    "relaxed": Relaxed,
    "relaxed_st": functools.partial(Relaxed, straight_through=True),
    "vq": VQ,
    "ema": EMA,
    "simvq": SimVQ,
    "fsq": FSQ,
    "lfq": LFQ,
}
"""What each name builds, from ``codes``, ``width`` and the options of its class."""


def build(name: str, codes: int, width: int, **options: Any) -> Bottleneck:
    """Make a bottleneck.

    Args:
        name: one of `KINDS`.
        codes: K; a continuous bottleneck does not look at it, and `FSQ` takes it as a wish.
        width: d, channels of a vector; `FSQ` and `LFQ` have their own.
        options: keyword arguments of the class.

    Raises:
        SettingError: there is no such name, the class has no such option, or a value is out of its range.

    Example:
        >>> build("vq", 16, 4, rotation=True).rotation
        True
        >>> build("vq", 16, 4, beta=0.25)
        Traceback (most recent call last):
            ...
        distopt.errors.SettingError: vq.beta is 0.25, but must be left out: the options are codebook_weight, \
commitment_weight, rotation
    """
    if name not in KINDS:
        raise SettingError("bottleneck", name, f"one of {', '.join(KINDS)}")
    known = options_of(name)
    for option, value in options.items():
        if option not in known:
            raise SettingError(f"{name}.{option}", value, f"left out: the options are {', '.join(known) or 'none'}")
    return KINDS[name](codes, width, **options)


def options_of(name: str) -> list[str]:
    """Names of the options of a kind.

    Example:
        >>> options_of("fsq")
        ['levels']
    """
    kind = KINDS[name]
    fixed = {"codes", "width", *(kind.keywords if isinstance(kind, functools.partial) else ())}
    return [each for each in inspect.signature(kind).parameters if each not in fixed]
