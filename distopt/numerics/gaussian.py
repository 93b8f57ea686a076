"""Random numbers that every rank draws alike, without a word between them."""

import hashlib

import torch
from torch import Tensor


def seeded_generator(*key: int | str) -> torch.Generator:
    """Make a random generator on the CPU that depends on its key alone.

    Args:
        key: what the numbers are for: a seed, a parameter's name, a step.

    Example:
        >>> int(torch.randint(10, (1,), generator=seeded_generator(0, "w"))) < 10
        True
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def seeded_generator_on(device: torch.device, *key: int | str) -> torch.Generator:
    """As `seeded_generator`, for tensors on ``device``; the numbers differ from one kind of device to another.

    Args:
        device: where numbers will be drawn; on the meta device none are.
        key: what the numbers are for.

    Example:
        >>> seeded_generator_on(torch.device("cpu"), 0, "w").device.type
        'cpu'
    """
    generator = seeded_generator(*key)
    if device.type in ("cpu", "meta"):
        return generator
    return torch.Generator(device).manual_seed(generator.initial_seed())


def seeded_gaussian(rows: int, columns: int, *key: int | str) -> Tensor:
    """Draw a standard normal matrix that depends on its key alone.

    Args:
        rows: rows of the matrix.
        columns: columns of the matrix.
        key: what the draw is for: a seed, a parameter's name, a step.

    Returns:
        A ``(rows, columns)`` float32 tensor on the CPU: the same for the same key in every process and on every device,
        independent of torch's global generator, which is left alone.

    Example:
        >>> bool((seeded_gaussian(3, 2, 0, "w", 1) == seeded_gaussian(3, 2, 0, "w", 1)).all())
        True
    """
    return torch.randn(rows, columns, generator=seeded_generator(*key))
