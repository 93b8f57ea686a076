"""Which matrix a parameter of any shape is treated as."""

import math
from collections.abc import Sequence


def nearest_to_square(shape: Sequence[int]) -> tuple[int, int]:
    """Split a shape between two of its dimensions so that the matrix is as near to square as it can be.

    Low-rank factors of an ``a x b`` matrix cost ``a + b`` numbers a column, which is least, for a given number of
    elements, where ``a`` and ``b`` are alike. The split keeps the order of the elements: the matrix is a view.

    Args:
        shape: the parameter's shape, without empty dimensions.

    Returns:
        Rows and columns, whose product is the number of elements; ``(1, n)`` for a vector. The earliest split wins a
        tie.

    Example:
        >>> nearest_to_square((128, 64, 3, 3)), nearest_to_square((3, 512, 512)), nearest_to_square((7,))
        ((128, 576), (1536, 512), (1, 7))
    """
    total = math.prod(shape)
    splits = [math.prod(shape[:i]) for i in range(len(shape))]
    rows = min(splits, key=lambda rows: max(rows, total // rows), default=1)
    return rows, total // rows
