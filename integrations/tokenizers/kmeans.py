"""k-means with k-means++ seeding (Arthur and Vassilvitskii, 2007): where the codes of a tokenizer start."""

import torch
from torch import Tensor


@torch.no_grad()
def kmeans(points: Tensor, k: int, *, generator: torch.Generator, rounds: int = 15) -> Tensor:
    """Find ``k`` centres of ``points``; leaves ``points`` alone.

    Args:
        points: ``(n, d)`` float, ``n >= 1``; fewer distinct points than ``k`` give repeated centres.
        k: number of centres.
        generator: draws the seeds, on the device of ``points``.
        rounds: of assignment and averaging after the seeding.

    Returns:
        ``(k, d)`` centres; one that loses all its points stays where it was.

    Example:
        >>> points = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> kmeans(points, 2, generator=torch.Generator().manual_seed(0)).sort(0).values
        tensor([[0.0500],
                [5.0500]])
    """
    device = points.device
    first = torch.randint(len(points), (1,), generator=generator, device=device)
    chosen = [points[first]]
    nearest = _squared_distances(points, chosen[0])[:, 0]
    for _ in range(k - 1):
        # The small constant keeps the draw legal once every point coincides with a centre.
        pick = torch.multinomial(nearest + 1e-12, 1, generator=generator)
        chosen.append(points[pick])
        nearest = torch.minimum(nearest, _squared_distances(points, points[pick])[:, 0])
    centres = torch.cat(chosen)
    for _ in range(rounds):
        owner = _squared_distances(points, centres).argmin(1)
        counts = torch.bincount(owner, minlength=k).to(points.dtype)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres


def _squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(points, centres).square()
