"""Low-rank compression as Dion's power iteration does it: the sketch and Cholesky's factors instead of reflections.

Written from the paper's description, on batched products of torch. Matrices of one shape are worked on as one stack,
which lies in memory as one already: nothing is gathered first.

Source: Ahn et al. 2025 (arXiv:2504.05295), algorithms 1 and 2.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

OVERSAMPLING = 1.25
"""Rows of the sketch, as a multiple of the rank."""


def orthonormal(p: Tensor, generator: torch.Generator) -> Tensor:
    """Randomised Cholesky-QR: the columns of ``p`` made orthonormal.

    Args:
        p: ``(k, m, r)``, float32, of full rank.
        generator: on its device; draws the sketch.

    Example:
        >>> q = orthonormal(torch.randn(2, 50, 4), torch.Generator().manual_seed(0))
        >>> bool((q.mT @ q - torch.eye(4)).abs().max() < 1e-5)
        True
    """
    _, rows, rank = p.shape
    sketched = min(rows, math.ceil(OVERSAMPLING * rank))
    sketch = torch.randn(sketched, rows, generator=generator, device=p.device) / math.sqrt(sketched)
    first = torch.linalg.qr(sketch @ p).R
    better = torch.linalg.solve_triangular(first, p, upper=True, left=False)
    second, _ = torch.linalg.cholesky_ex(better.mT @ better, upper=True)
    return torch.linalg.solve_triangular(second, better, upper=True, left=False)


def dions(shapes: Sequence[tuple[int, ...]], bucket: Tensor, rank: int) -> Callable[[], None]:
    """A step of every matrix of a bucket: the same products as PowerSGD's, and the same residual.

    Args:
        shapes: of the parameters, one after another in ``bucket``; what is a vector is left as it is.
        bucket: the gradients, replaced by their approximations.
        rank: of the factors.
    """
    device = bucket.device
    generator = torch.Generator(device).manual_seed(0)
    segments = bucket.split([math.prod(shape) for shape in shapes])
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for shape, segment in zip(shapes, segments, strict=True):
        if len(shape) > 1:
            matrix = segment.view(shape[0], -1)
            groups.setdefault((matrix.shape[0], matrix.shape[1]), []).append(matrix)
    stacks = {shape: torch.zeros(len(own), *shape, device=device) for shape, own in groups.items()}
    ranks = {shape: min(rank, *shape) for shape in groups}
    bases = {
        (m, n): torch.randn(len(own), n, ranks[m, n], generator=generator, device=device)
        for (m, n), own in groups.items()
    }

    def step() -> None:
        for shape, own in groups.items():
            stack = stacks[shape]
            torch._foreach_add_(list(stack.unbind()), [gradient.to(stack.dtype) for gradient in own])
            left = orthonormal(stack @ bases[shape], generator)
            right = stack.mT @ left
            stack.baddbmm_(left, right.mT, alpha=-1)
            for gradient, p, q in zip(own, left, right, strict=True):
                if gradient.dtype == torch.float32:
                    torch.mm(p, q.mT, out=gradient)
                else:
                    gradient.copy_(p @ q.mT)
            bases[shape] = right / torch.linalg.vector_norm(right, dim=1, keepdim=True).clamp_min(1e-30)

    return step
