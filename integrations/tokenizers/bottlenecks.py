"""Bottlenecks by name: one setting chooses what an autoencoder, or stage 1 of a DALL-E, is built with."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from distopt.errors import SettingError

from .bottleneck import Bottleneck
from .fsq import FSQ
from .vq import VQ

KINDS: Mapping[str, Callable[..., Bottleneck]] = {"vq": VQ, "fsq": FSQ}
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
    known = [each for each in inspect.signature(KINDS[name]).parameters if each not in ("codes", "width")]
    for option, value in options.items():
        if option not in known:
            raise SettingError(f"{name}.{option}", value, f"left out: the options are {', '.join(known) or 'none'}")
    return KINDS[name](codes, width, **options)
