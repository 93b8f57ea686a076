"""Which positions a layer of the transformer attends to: the paper's three sparse masks, as definitions.

The stream is ``start, text (T), image (G)``. Its first ``1 + T`` positions are text here: they attend causally, to text
alone. What follows are the slots of the g x g image in raster order; every slot attends to all text. Among the slots
each of the paper's masks is a set of distances back in the raster, the same for every slot:

========  ============================================  =====================================================
kind      distances back                                which slots these are
========  ============================================  =====================================================
row       0 to g                                        the slot itself and the g before it: one row's length of
                                                        raster, whose far end is the slot right above
column    0, g, 2 g, ...                                the slot's own column, down to the slot
conv      a g + b with a from 0 to h and b from -h to   the k x k square around the slot, k = 2 h + 1, as far as it
          h, as far as these are not negative           is not in the future
full      all                                           everything up to the slot
========  ============================================  =====================================================

Edges wrap around in the raster: what lies beyond the right edge of a row is the start of the next, what lies before its
left edge is the end of the one above. A distance that leads before the first slot leads nowhere. So the row mask
is 33 slots in a 32 x 32 picture, and the convolution of kernel 11 is 61 where no edge of the picture is near.

The paper's figure 11 has 6 text positions and 16 slots; that is T = 5 and g = 4 here, for the start counts as text. As
in its figure 10, a slot carries the row and the column of the code that it *predicts*, and is fed the code before
that one. So a row layer at slot i knows of the codes i - g - 1 to i - 1, among them i - g, right above.

Source: Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021, appendix B.1 and figure 11. The paper does not write
out how a square wraps around; this is the reading under which its row mask and its convolution are of one kind.
"""

import dataclasses
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

FULL, ROW, COLUMN, CONV = "full", "row", "column", "conv"


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What the positions of one layer attend to.

    Args:
        kind: "full", "row", "column" or "conv".
        text: text positions, the start included.
        grid: g, side of the image in slots.
        kernel: k, side of the square that "conv" sees, an odd number.

    Example:
        >>> Pattern("row", text=6, grid=4, kernel=3).offsets
        (0, 1, 2, 3, 4)
        >>> Pattern("column", text=6, grid=4, kernel=3).offsets
        (0, 4, 8, 12)
        >>> Pattern("conv", text=6, grid=4, kernel=3).offsets
        (0, 1, 3, 4, 5)
    """

    kind: str
    text: int
    grid: int
    kernel: int

    @property
    def slots(self) -> int:
        """G, number of image slots."""
        return self.grid * self.grid

    @property
    def positions(self) -> int:
        """Length of the stream."""
        return self.text + self.slots

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Distances back in the raster at which a slot sees slots, itself (0) included, in rising order."""
        grid, half = self.grid, self.kernel // 2
        distances = {
            FULL: lambda: range(self.slots),
            ROW: lambda: range(grid + 1),
            COLUMN: lambda: range(0, self.slots, grid),
            CONV: lambda: (above * grid + left for above in range(half + 1) for left in range(-half, half + 1)),
        }[self.kind]()
        return tuple(sorted({distance for distance in distances if 0 <= distance < self.slots}))


def layer_kinds(attention: str, layers: int) -> tuple[str, ...]:
    """Name the mask of every layer.

    Args:
        attention: "full", or "paper" for the paper's order: the last layer is convolutional; of the others, counted
            from 1, the second and every fourth after it sees columns; the rest see rows.
        layers: how many there are.

    Example:
        >>> layer_kinds("paper", 6)
        ('row', 'column', 'row', 'row', 'row', 'conv')

    Source: Ramesh et al. 2021, appendix B.1, whose model has 64 layers.
    """
    if attention == FULL:
        return (FULL,) * layers
    return (*(COLUMN if layer % 4 == 2 else ROW for layer in range(1, layers)), CONV)


def image_mask(pattern: Pattern) -> Tensor:
    """Tell which slots see which.

    Returns:
        bool ``(G, G)`` on the CPU: whether the slot of a row attends to the slot of a column.
    """
    slots = torch.arange(pattern.slots, device="cpu")
    distances = slots.unsqueeze(1) - slots
    return torch.isin(distances, torch.tensor(pattern.offsets, device="cpu"))


@functools.lru_cache(maxsize=16)
def stream_mask(pattern: Pattern, device: torch.device) -> Tensor:
    """Tell which positions see which.

    Returns:
        bool ``(n, n)`` on ``device``, for the whole stream of n positions; it is kept for the next call.

    Example:
        >>> stream_mask(Pattern("column", text=2, grid=2, kernel=3), torch.device("cpu")).int()
        tensor([[1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [1, 1, 1, 0, 0, 0],
                [1, 1, 0, 1, 0, 0],
                [1, 1, 1, 0, 1, 0],
                [1, 1, 0, 1, 0, 1]], dtype=torch.int32)
    """
    # A tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        mask = torch.ones(pattern.positions, pattern.positions, dtype=torch.bool, device="cpu").tril()
        mask[pattern.text :, pattern.text :] = image_mask(pattern)
        return mask.to(device)


def attend_densely(queries: Tensor, keys: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """Attention with every pair of positions computed and masked; what faster paths are tested against.

    Args:
        queries: ``(B, heads, n, d)`` of the first n positions of the stream.
        keys: of the same shape.
        values: of the same shape.
        pattern: who sees whom.

    Returns:
        ``(B, heads, n, d)``.
    """
    positions = queries.shape[2]
    if pattern.kind == FULL or positions <= pattern.text:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=positions > 1)
    mask = stream_mask(pattern, queries.device)[:positions, :positions]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
