"""Orthonormal columns and unit columns, the two normalisations of a low-rank factor.

Symbols: P is ``(..., n, r)``, tall and thin; e is the multiple of the identity, relative to P's largest column.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.kernels.choice import chosen

IDENTITY = 1e-6
"""The multiple of the identity that is added before orthogonalising, in units of the largest column norm
(Ramesh et al. 2021, arXiv:2102.12092, appendix E.2, there an absolute 1e-6)."""

DEAD_NORM = 1e-4
"""A column this much shorter than the longest one carries nothing that float32 can tell from rounding."""

PADDED = 1 << 16
"""Numbers up to which stacks of several heights are filled up with zeros to one, as each call costs more than they."""

SHORT = (torch.bfloat16, torch.float16)
"""What is worked on in float32, and rounded."""

FEW = 8
"""Columns up to which inner products of float32 are taken in float64."""

_LEAST = 1e-100
"""What a column of zeros gets in the place of its length: far below the length of any other column, in float64."""

DEAD_SINE = 1e-2
"""A column whose angle to the columns before it has a smaller sine adds no direction of its own."""


def unit_size(matrix: Tensor) -> Tensor:
    """Divide each matrix by its largest absolute value, so that squares neither overflow nor vanish.

    Args:
        matrix: ``(..., n, r)``, floating point.

    Returns:
        The same shape and dtype, with largest absolute value 1; a zero matrix stays zero.

    Example:
        >>> unit_size(torch.tensor([[4e30], [-2e30]])).flatten().tolist()
        [1.0, -0.5]
    """
    size = matrix.abs().amax(dim=(-2, -1), keepdim=True)
    return matrix / torch.where(size > 0, size, 1)


def orthogonalize(matrix: Tensor, identity: float = IDENTITY) -> Tensor:
    """Orthonormalise columns by Householder reflections, after adding a small multiple of the identity.

    The identity keeps a rank-deficient matrix from handing its rounding errors on as directions; being relative to the
    largest column it makes the result independent of the matrix's unit. The result is orthonormal for every finite
    input, a zero matrix included.

    Args:
        matrix: ``(..., n, r)`` with n >= r, float32 or float64; 16 bits are worked on in float32. It is not changed.
        identity: multiple of the identity, relative to the largest column norm.

    Returns:
        ``(..., n, r)`` with orthonormal columns, spanning what ``matrix + e * I`` spans, in the dtype that came in.

    Example:
        >>> q = orthogonalize(torch.randn(5, 3))
        >>> bool((q.T @ q - torch.eye(3)).abs().max() < 1e-6)
        True

    Source: Ramesh et al. 2021 (arXiv:2102.12092), appendix E.2, step 5.
    """
    if _has_kernel(matrix):
        turned = matrix.mT
        stack = turned.reshape(-1, *turned.shape[-2:])
        return _by_kernel([stack], identity)[0].view(turned.shape).mT
    if matrix.dtype in SHORT:
        return orthogonalize(matrix.float(), identity).to(matrix.dtype)
    if matrix.shape[-1] == 1:
        return _unit_column(matrix, identity)
    scaled = unit_size(matrix)
    lengths = torch.linalg.vector_norm(scaled, dim=-2)
    scaled.diagonal(dim1=-2, dim2=-1).add_(identity * lengths.amax(dim=-1, keepdim=True))
    reflectors, tau = torch.geqrf(scaled)
    return torch.linalg.householder_product(reflectors, tau)


def _has_kernel(matrix: Tensor) -> bool:
    return matrix.dtype != torch.float64 and chosen(matrix.device)


def _by_kernel(stacks: Sequence[Tensor], identity: float) -> list[Tensor]:
    """Stacks of transposed matrices, by the Triton edition."""
    from distopt.kernels.householder import orthonormal_rows

    return orthonormal_rows(stacks, identity)


def _unit_column(matrix: Tensor, identity: float) -> Tensor:
    """All that a reflection does to a single column, but for its sign."""
    column = unit_size(matrix) if matrix.dtype == torch.float64 else matrix.double()
    length = torch.linalg.vector_norm(column, dim=-2)
    column[..., 0, :].add_(length.mul_(identity).clamp_min_(_LEAST))
    return column.div_(torch.linalg.vector_norm(column, dim=-2, keepdim=True)).to(matrix.dtype)


def orthonormal_rows(stacks: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonalize` of many stacks of transposed matrices, in one call where they are small.

    Matrices of fewer rows are filled up with rows of zeros there, which reflections leave alone.

    Args:
        stacks: ``(k, r, n)`` each, with r <= n, float32 or float64; 16 bits are worked on in float32. They are not
            changed.

    Returns:
        Stacks of the same shapes and dtypes, with orthonormal rows.

    Example:
        >>> [tuple(q.shape) for q in orthonormal_rows([torch.ones(2, 1, 3), torch.ones(1, 1, 5)])]
        [(2, 1, 3), (1, 1, 5)]
    """
    if all(_has_kernel(stack) for stack in stacks):
        return _by_kernel(stacks, IDENTITY)
    count, longest = sum(len(stack) for stack in stacks), max(stack.shape[2] for stack in stacks)
    rank = stacks[0].shape[1]
    alike = all(stack.shape[1] == rank for stack in stacks)
    if len(stacks) == 1 or not alike or count * longest * rank > PADDED:
        return [orthogonalize(stack.mT).mT for stack in stacks]
    padded, lengths = stacks[0].new_zeros(count, rank, longest), [len(stack) for stack in stacks]
    for part, stack in zip(padded.split_with_sizes(lengths), stacks, strict=True):
        part[:, :, : stack.shape[2]].copy_(stack)
    done = orthogonalize(padded.mT).mT.split_with_sizes(lengths)
    return [part[:, :, : stack.shape[2]] for part, stack in zip(done, stacks, strict=True)]


def normalize_columns(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Scale columns to length 1 and tell which of them carry a direction of their own.

    A column is dead when it is far shorter than the longest one, or (nearly) a combination of the columns before it:
    a power iteration that starts from it finds nothing that the others do not. The test is the diagonal of the Cholesky
    factor of the columns' Gram matrix, which holds the sines of those angles.

    Args:
        matrix: ``(..., n, r)``, float32 or float64. It is not changed.

    Returns:
        The scaled matrix, dead columns zero, and a boolean ``(..., r)`` that is true for the living ones.

    Example:
        >>> _, alive = normalize_columns(torch.tensor([[3.0, 6.0, 0.0], [4.0, 8.0, 1.0]]))
        >>> alive.tolist()
        [True, False, True]
    """
    return normalize_stacks([matrix])[0]


def normalize_stacks(stacks: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """`normalize_columns` of many stacks of matrices at once, which looks at all matrices of one rank together.

    Args:
        stacks: ``(..., k, n, r)`` each, float32 or float64. They are not changed.

    Returns:
        What `normalize_columns` returns, for each of them.

    Example:
        >>> [alive.tolist() for _, alive in normalize_stacks([torch.ones(1, 2, 1), torch.ones(1, 3, 2)])]
        [[[True]], [[True, False]]]
    """
    if len(stacks) == 1 and stacks[0].shape[-1] == 1:
        return [_normalized(stacks[0])]
    # Squares of float32 neither overflow nor vanish in float64; where there are many columns, that is the dearer way.
    fits = [stack.dtype == torch.float32 and stack.shape[-1] <= FEW for stack in stacks]
    scaled = [stack if fit else unit_size(stack) for stack, fit in zip(stacks, fits, strict=True)]
    wide = [each.double() if fit else each for each, fit in zip(scaled, fits, strict=True)]
    grams = [(each.mT @ each).double() for each in wide]
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for rank in sorted({stack.shape[-1] for stack in stacks}):
        places = [i for i, stack in enumerate(stacks) if stack.shape[-1] == rank]
        dtype = stacks[places[0]].dtype
        least = torch.finfo(dtype).tiny
        inverse, alive = _inverse_lengths(torch.cat([grams[i].reshape(-1, rank, rank) for i in places]), least)
        inverse = inverse.to(dtype)
        counts = [math.prod(stacks[i].shape[:-2]) for i in places]
        scales, living = inverse.split_with_sizes(counts), alive.split_with_sizes(counts)
        for i, scale, lives in zip(places, scales, living, strict=True):
            shape = (*stacks[i].shape[:-2], rank)
            results[i] = scaled[i] * scale.view(*shape[:-1], 1, rank), lives.view(shape)
    return [results[i] for i in range(len(stacks))]


def _normalized(columns: Tensor) -> tuple[Tensor, Tensor]:
    """`normalize_stacks` of a stack of single columns."""
    scaled = unit_size(columns) if columns.dtype == torch.float64 else columns
    norms = torch.linalg.vector_norm(scaled, dim=-2, keepdim=True, dtype=torch.float64)
    alive = norms > torch.finfo(columns.dtype).tiny
    return scaled * torch.where(alive, norms.reciprocal_(), 0).to(columns.dtype), alive[..., 0, :]


def _inverse_lengths(gram: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """What to multiply columns by, given their inner products ``(k, r, r)``: 0 for the dead ones; and which live.

    Columns shorter than ``least`` are dead: the inverse of their length is beyond their dtype.
    """
    if gram.shape[-1] == 1:
        norms = gram[..., 0].sqrt()
        long = norms > least
        return torch.where(long, norms.reciprocal(), 0), long
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    long = norms > (DEAD_NORM * norms.amax(dim=-1, keepdim=True)).clamp_min_(least)
    inverse = torch.where(long, norms.reciprocal(), 0)
    cosines = inverse[..., None] * gram * inverse[..., None, :]
    cosines.diagonal(dim1=-2, dim2=-1).add_(0.01 * DEAD_SINE**2)
    factor, _ = torch.linalg.cholesky_ex(cosines)
    alive = factor.diagonal(dim1=-2, dim2=-1) > DEAD_SINE
    return inverse * alive, alive
