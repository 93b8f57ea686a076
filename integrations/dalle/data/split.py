"""Which pictures are never trained on: decided by each name alone, so that growing data keep their split."""

import hashlib

import numpy as np


def place_of(name: str) -> float:
    """A number in [0, 1) that depends on the name alone.

    Example:
        >>> round(place_of("a.png"), 3)
        0.496
    """
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64


def held_out(places: np.ndarray, fraction: float) -> np.ndarray:
    """Choose a fraction of the names.

    Args:
        places: float64 ``(n,)``, of `place_of`.
        fraction: in [0, 1); above 0 at least one name is chosen and one is not, where there are two.

    Returns:
        Bool ``(n,)``.

    Example:
        >>> held_out(np.array([0.1, 0.7, 0.9]), 0.5).tolist()
        [True, False, False]
    """
    chosen = places < fraction
    if fraction > 0 and len(places) > 1:
        chosen[places.argmin()] = True
        chosen[places.argmax()] = False
    return chosen
