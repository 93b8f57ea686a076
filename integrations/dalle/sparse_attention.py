"""Attention under the paper's masks without the pairs that nobody looks at.

The slots of one row of the image see, besides all text, a band of the raster that ends with them: two rows of slots
under the row mask, seven under a convolution of kernel 11. So the keys are laid out once more, as the band of each
row, and one row's queries meet their band alone. A column's slots see their own column, which is a band of its own
once rows and columns are exchanged, as in the paper. Text and band share one softmax, as there.

Which way is faster depends on how many of the keys are left. On a CPU (torch 2.13, one thread, forward with backward)
a 32 x 32 image takes about a third of the dense time under the row and column masks, and half to two thirds under the
convolution; a 6 x 6 image takes twice as long (docs/dalle.md).
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import COLUMN, FULL, Pattern, attend_densely, image_mask

_WORTHWHILE = 0.4
"""Share of the stream's keys up to which gathering them is faster than masking the others (docs/dalle.md)."""


def attend(queries: Tensor, keys: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """Attention by the way that is faster; see `attend_densely`.

    Args:
        queries: ``(B, heads, n, d)`` of the first n positions of the stream.
        keys: of the same shape.
        values: of the same shape.
        pattern: who sees whom.

    Returns:
        ``(B, heads, n, d)``.
    """
    whole = queries.shape[2] == pattern.positions
    if whole and pattern.kind != FULL and keys_per_query(pattern) <= _WORTHWHILE * pattern.positions:
        return attend_gathered(queries, keys, values, pattern)
    return attend_densely(queries, keys, values, pattern)


def keys_per_query(pattern: Pattern) -> int:
    """How many keys `attend_gathered` computes for a slot, those that are then masked included.

    Example:
        >>> keys_per_query(Pattern("row", text=257, grid=32, kernel=11))
        321
    """
    return pattern.text + (1 if pattern.kind == COLUMN else _rows(pattern)) * pattern.grid


def attend_gathered(queries: Tensor, keys: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """Attention in which each row or column of the image meets the text and its own band of slots.

    Args:
        queries: ``(B, heads, n, d)`` of the whole stream.
        keys: of the same shape.
        values: of the same shape.
        pattern: who sees whom.

    Returns:
        ``(B, heads, n, d)``, equal to that of `attend_densely` up to rounding, and so are its gradients.

    Source: Ramesh et al. 2021, appendix B.1 (columns by transposing, one softmax over text and image).
    """
    text = pattern.text
    (words, slots), (word_keys, slot_keys), (word_values, slot_values) = (
        tensor.split([text, pattern.slots], dim=2) for tensor in (queries, keys, values)
    )
    slots = slots * slots.shape[-1] ** -0.5
    to_text = _grouped(slots @ word_keys.transpose(-1, -2), pattern)
    band_keys, band_values = _bands(slot_keys, pattern), _bands(slot_values, pattern)
    to_image = _grouped(slots, pattern) @ band_keys.transpose(-1, -2)
    scores = torch.cat([to_text, to_image + _bias(pattern, queries.device).to(to_image.dtype)], dim=-1)
    # In 16 bits, too, a softmax is computed in float32.
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
    on_text, on_image = weights.split([text, band_keys.shape[3]], dim=-1)
    image = _ungrouped(on_text, pattern) @ word_values + _ungrouped(on_image @ band_values, pattern)
    return torch.cat([F.scaled_dot_product_attention(words, word_keys, word_values, is_causal=text > 1), image], dim=2)


def _rows(pattern: Pattern) -> int:
    """Rows of the image in the band of a row."""
    return min(pattern.grid, -(-pattern.offsets[-1] // pattern.grid) + 1)


def _grouped(tensor: Tensor, pattern: Pattern) -> Tensor:
    """Slots ``(B, heads, G, x)`` by rows, or by columns: ``(B, heads, g, g, x)``."""
    square = tensor.unflatten(2, (pattern.grid, pattern.grid))
    return square.transpose(2, 3) if pattern.kind == COLUMN else square


def _ungrouped(tensor: Tensor, pattern: Pattern) -> Tensor:
    """What `_grouped` does, undone."""
    return (tensor.transpose(2, 3) if pattern.kind == COLUMN else tensor).flatten(2, 3)


def _bands(tensor: Tensor, pattern: Pattern) -> Tensor:
    """What each row or column of the image meets, ``(B, heads, g, slots of a band, d)``; zeros above the image."""
    square = _grouped(tensor, pattern)
    if pattern.kind == COLUMN:
        return square
    rows, grid = _rows(pattern), pattern.grid
    padded = F.pad(square, (0, 0, 0, 0, rows - 1, 0))
    return torch.cat([padded[:, :, first : first + grid] for first in range(rows)], dim=3)


@functools.lru_cache(maxsize=16)
def _bias(pattern: Pattern, device: torch.device) -> Tensor:
    """Zero where a slot sees a slot of its band, else minus infinity: ``(g, g, slots of a band)``, or one for all."""
    grid = pattern.grid
    with torch.inference_mode(False):
        if pattern.kind == COLUMN:
            seen = torch.ones(grid, grid, dtype=torch.bool, device="cpu").tril()
        else:
            rows = _rows(pattern)
            padded = F.pad(image_mask(pattern), ((rows - 1) * grid, 0))
            seen = torch.stack(
                [padded[row * grid : (row + 1) * grid, row * grid : (row + rows) * grid] for row in range(grid)]
            )
        return torch.zeros(seen.shape, device="cpu").masked_fill(~seen, -torch.inf).to(device)
