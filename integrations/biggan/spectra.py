"""The largest singular values of weights, by products with them alone.

A block Krylov method: a random block is multiplied by ``A A^T`` again and again, and all that comes out is kept and
orthonormalised; the singular values of ``A`` on its span are those sought, from below. A power iteration on one vector
would stall where two singular values are nearly equal, and a Krylov space of one vector finds only one of two equal
ones.

====  ==================================================
A     a weight as a matrix ``(m, n)``, its smaller side first
Q     the orthonormal basis so far, ``(m, k)``
B     ``A^T Q``, ``(n, k)``
====  ==================================================

Source: Golub and Underwood 1977, "The block Lanczos method"; Brock et al. 2019 (arXiv:1809.11096), section 4 and
appendix F.
"""

import torch
from torch import Tensor, nn

from distopt.errors import SettingError

from .spectral import weights

_TOLERANCE = 1e-5
"""Of the residual, in parts of the largest squared singular value; values are wrong by less than half of it."""
_SPARE = 2
"""Columns of a block beyond those sought."""


@torch.no_grad()
def top_singular_values(weight: Tensor, count: int = 3) -> Tensor:
    """The ``count`` largest singular values of a weight, equal ones as often as they occur.

    Args:
        weight: of two dimensions or more, the first of which is kept; neither its gradient nor the random numbers of
            the program change.
        count: how many; zeros stand for those that the matrix does not have.

    Returns:
        float64 ``(count,)``, in falling order; relative to the first, within 1e-5. NaN if the weight is not finite.

    Raises:
        SettingError: ``count`` is less than 1, or the weight has fewer than two dimensions.

    Example:
        >>> top_singular_values(torch.diag(torch.tensor([1.0, 5.0, 5.0, 2.0]))).round(decimals=6).tolist()
        [5.0, 5.0, 2.0]
    """
    if count < 1:
        raise SettingError("count", count, "at least 1")
    if weight.dim() < 2:
        raise SettingError("weight", f"of {weight.dim()} dimensions", "of two or more")
    matrix = weight.detach().flatten(1).double()
    if not bool(matrix.isfinite().all()):
        return matrix.new_full((count,), torch.nan)
    matrix = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    found = _krylov(matrix, min(count, matrix.shape[0]))
    return torch.cat([found, found.new_zeros(count - len(found))])


def top_singular_values_of(model: nn.Module, count: int = 3) -> dict[str, tuple[float, ...]]:
    """The largest singular values of every weight of a model, by name; of normalised weights before normalisation.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0, 3.0], [1.0, 0.0]]))
        >>> {name: tuple(round(value, 4) for value in values) for name, values in top_singular_values_of(model).items()}
        {'0.weight': (3.0, 1.0, 0.0)}
    """
    return {name: tuple(top_singular_values(weight, count).tolist()) for name, weight in weights(model)}


def _krylov(matrix: Tensor, count: int) -> Tensor:
    rows = matrix.shape[0]
    scale = matrix.abs().max()
    if scale == 0:
        return matrix.new_zeros(count)
    matrix = matrix / scale
    generator = torch.Generator(matrix.device).manual_seed(rows)
    width = min(count + _SPARE, rows)
    block = torch.randn(rows, width, generator=generator, dtype=matrix.dtype, device=matrix.device)
    basis, image = matrix.new_empty(rows, 0), matrix.new_empty(matrix.shape[1], 0)
    while True:
        block = _orthonormal(block, basis)
        if block.shape[1] == 0 and image.shape[1] < count:
            # The products gave nothing new: what they span is all of the image, and the rest is zeros.
            values = torch.linalg.svdvals(image)
            return torch.cat([values, values.new_zeros(count - len(values))]) * scale
        basis, image = torch.cat([basis, block], 1), torch.cat([image, matrix.T @ block], 1)
        _, values, right = torch.linalg.svd(image, full_matrices=False)
        vectors = basis @ right[:count].T
        wrong = matrix @ (matrix.T @ vectors) - vectors * values[:count].square()
        if block.shape[1] == 0 or basis.shape[1] == rows or wrong.norm(dim=0).max() <= _TOLERANCE * values[0] ** 2:
            return values[:count] * scale
        block = matrix @ image[:, -block.shape[1] :]


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of what a block adds to a basis."""
    lengths = block.norm(dim=0)
    for _ in range(2):  # once leaves rounding errors of the size of what was taken off
        block = block - basis @ (basis.T @ block)
    left, values, _ = torch.linalg.svd(block, full_matrices=False)
    fresh = left[:, values > 1e-10 * lengths.max()][:, : basis.shape[0] - basis.shape[1]]
    fresh = fresh - basis @ (basis.T @ fresh)
    return torch.linalg.qr(fresh)[0]
