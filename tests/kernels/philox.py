"""Philox 4x32 in numpy, as its authors describe it, and the draws that kernels take from it.

Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3, section 3.3 and table 2.
"""

import numpy as np
import torch

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def philox(seed, counters, rounds=7):
    """Four words of 32 bits for each counter of four words: uint64, ``(4, ...)`` in and out."""
    c0, c1, c2, c3 = (np.asarray(each, dtype=np.uint64) & _LOW for each in np.broadcast_arrays(*counters))
    keys = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(rounds):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        k0, k1 = (np.uint64(key) for key in keys)
        c0, c1, c2, c3 = (
            second >> np.uint64(32) ^ c1 ^ k0,
            second & _LOW,
            first >> np.uint64(32) ^ c3 ^ k1,
            first & _LOW,
        )
        keys = [(key + step) & 0xFFFFFFFF for key, step in zip(keys, _WEYL, strict=True)]
    return np.stack([c0, c1, c2, c3])


def draws(seed, high, low, count=0):
    """What `distopt.kernels.formats.draws_of` is to give: eight of 16 bits for each counter, int32."""
    words = philox(seed, (low, high, count, 0))
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], 1)  # (word, half, ...)
    eight = np.moveaxis(halves.reshape(8, *words.shape[1:]), 0, -1)
    return torch.from_numpy(eight.reshape(*eight.shape[:-2], -1).astype(np.int32))
