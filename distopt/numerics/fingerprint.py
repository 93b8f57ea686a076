"""Checksums that tell whether two tensors, or two texts, are the same to the bit."""

import functools
import hashlib

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Words of 64 bits that are summed at a time: a temporary takes 512 KiB and stays in a CPU's cache."""

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # odd; 2^64 over the golden ratio, as a signed number
_STIR = 0xD6E8FEB86659FD93 - (1 << 64)  # odd
_LOW_32 = 0xFFFFFFFF


def fingerprint(tensor: Tensor) -> Tensor:
    """A checksum of a tensor's numbers as bits, in row-major order: -0.0 is not 0.0, and a NaN equals itself.

    It does not depend on the strides. Shape and dtype are not part of it. Computed on the tensor's device, in chunks;
    a tensor that is not contiguous is copied first.

    A change within one aligned word of 64 bits, one flipped bit above all, always changes the checksum. Other changes,
    such as two elements that changed places, go unnoticed only by a coincidence of 64 bits.

    Args:
        tensor: dense, of any shape and dtype.

    Returns:
        0-dimensional, int64, on the same device.

    Example:
        >>> ones = torch.ones(3, 4)
        >>> bool(fingerprint(ones) == fingerprint(ones.t().contiguous().t()))
        True
        >>> ones[2, 1] = torch.nextafter(ones[2, 1], torch.tensor(2.0))
        >>> bool(fingerprint(ones) == fingerprint(torch.ones(3, 4)))
        False
    """
    # Why a change within word x_i always shows: all arithmetic is modulo 2^64, where multiplying by an odd number and
    # x -> x ^ (x >> 32) are one-to-one. So the stirred word y_i changes, say by d != 0. The sum of its chunk then
    # changes by w_i d, and the total by w_i d m^k, which is not 0 as w_i (the word's weight) and m are odd.
    data = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8)
    total = torch.full((), data.numel(), dtype=torch.int64, device=data.device)
    for chunk in data.split(8 * CHUNK):
        words = _words(chunk)
        total = total * _GOLDEN + (_stir(words) * _weights(data.device)[: words.numel()]).sum()
    return total


def digest(*texts: str) -> int:
    """A number that stands for some texts, the same in every process and on every machine.

    Args:
        texts: where one ends and the next begins matters.

    Returns:
        63 bits, so that it fits int64.

    Example:
        >>> digest("ab", "c") == digest("a", "bc"), digest("ab") == digest("ab")
        (False, True)
    """
    state = hashlib.blake2b(digest_size=8)
    for text in texts:
        data = text.encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return int.from_bytes(state.digest(), "little") >> 1


def _words(data: Tensor) -> Tensor:
    """Bytes as int64, the last word filled up with zeros."""
    if data.numel() % 8:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 8))
    elif data.storage_offset() % 8 or data.data_ptr() % 8:
        data = data.clone()  # a piece of a buffer of small elements: it cannot be seen as words where it lies
    return data.view(torch.int64)


def _stir(words: Tensor) -> Tensor:
    """Let every bit change low and high bits alike.

    Without it the highest bit of a word would change only the highest bit of the sum, whatever the word's odd weight,
    and 1.0 and -1.0 could change places.
    """
    mixed = (words ^ _high_half(words)).mul_(_STIR)
    return mixed.bitwise_xor_(_high_half(mixed))


def _high_half(words: Tensor) -> Tensor:
    return (words >> 32).bitwise_and_(_LOW_32)  # the shift of a negative number brings ones in: cut them off


@functools.lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    """An odd number for each place in a chunk, without a pattern: multiples of one number would cancel in pairs."""
    return _stir(torch.arange(1, CHUNK + 1, device=device) * _GOLDEN).bitwise_or_(1)
