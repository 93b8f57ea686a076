"""Arithmetic of the scores: reconstruction errors, baselines, the Frechet distance. Nothing here knows a model.

=======  ============================================
symbol   meaning
=======  ============================================
B        pictures
D        features of a picture
K        codes
=======  ============================================

Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004, section III;
Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017, section 2 (the Frechet distance of features).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW, _SIGMA = 11, 1.5
_STABLE_MEAN, _STABLE_VARIANCE = 0.01**2, 0.03**2
"""The paper's constants, squared, for pixels in [0, 1]."""


def psnr(squared_error: float) -> float:
    """Peak signal-to-noise ratio of pictures in [0, 1], in decibels; infinite where nothing differs.

    Args:
        squared_error: the mean over all sub-pixels.

    Example:
        >>> psnr(0.01)
        20.0
    """
    return math.inf if squared_error == 0 else -10 * math.log10(squared_error)


def ssim(pictures: Tensor, others: Tensor) -> Tensor:
    """Structural similarity, the mean over channels and over all places where the window lies inside the picture.

    The window is a Gaussian of width 1.5 on 11 x 11 pixels, or on as many as there are in smaller pictures.

    Args:
        pictures: ``(B, C, H, W)`` in [0, 1].
        others: the same shape.

    Returns:
        ``(B,)`` float64, at most 1.

    Example:
        >>> x = torch.rand(2, 3, 16, 16)
        >>> ssim(x, x)
        tensor([1., 1.], dtype=torch.float64)
    """
    x, y = pictures.double(), others.double()
    windows = [_window(min(_WINDOW, side - 1 + side % 2)).to(x.device) for side in x.shape[-2:]]

    def mean(values: Tensor) -> Tensor:
        rows = F.conv2d(values.flatten(0, 1).unsqueeze(1), windows[0].reshape(1, 1, -1, 1))
        return F.conv2d(rows, windows[1].reshape(1, 1, 1, -1)).squeeze(1).unflatten(0, x.shape[:2])

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + _STABLE_MEAN) / (mean_x**2 + mean_y**2 + _STABLE_MEAN)
    likeness = likeness * (2 * covariance + _STABLE_VARIANCE) / (variances + _STABLE_VARIANCE)
    return likeness.mean((1, 2, 3))


def _window(size: int) -> Tensor:
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weights = (-0.5 * (places / _SIGMA) ** 2).exp()
    return weights / weights.sum()


def unigram_loss(training: Tensor, held_out: Tensor, codes: int) -> float:
    """Cross-entropy of ``held_out`` under how often each code occurs in the same column of ``training``.

    Args:
        training: ``(N, columns)`` int64 below ``codes``.
        held_out: ``(M, columns)`` int64 below ``codes``.
        codes: number of codes; every count is raised by one, so that a code never seen has a chance.

    Returns:
        Nats a token.

    Example:
        >>> round(unigram_loss(torch.tensor([[0], [0], [1]]), torch.tensor([[0]]), codes=2), 4)
        0.5108
    """
    counts = torch.ones(codes, training.shape[1], dtype=torch.float64)
    counts.scatter_add_(0, training, torch.ones(training.shape, dtype=torch.float64))
    return float(-(counts / counts.sum(0)).log().gather(0, held_out).mean())


class Moments:
    """Mean and covariance of features that come in parts, in float64.

    Example:
        >>> moments = Moments()
        >>> moments.add(torch.tensor([[0.0], [2.0]]))
        >>> moments.add(torch.tensor([[4.0]]))
        >>> moments.mean.item(), moments.covariance.item()
        (2.0, 4.0)
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Take ``(B, D)`` features into account.

        Raises:
            ValueError: not two dimensions, or not as many features as before, or one that is not finite.
        """
        x = features.detach().double().cpu()
        if x.ndim != 2 or (self.count and x.shape[1] != len(self.mean)):
            raise ValueError(f"features must be (B, {len(self.mean) if self.count else 'D'}), got {tuple(x.shape)}")
        if not x.isfinite().all():
            raise ValueError("a feature is not finite")
        if not len(x):
            return
        if not self.count:
            self.mean, self._scatter = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        # Chan's update: the scatter of a part about its own mean, and what the distance of the means adds.
        mean, total = x.mean(0), self.count + len(x)
        centred, between = x - mean, mean - self.mean
        self._scatter += centred.T @ centred + torch.outer(between, between) * (self.count * len(x) / total)
        self.mean = self.mean + between * (len(x) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """``(D, D)``, the scatter divided by one less than the count."""
        return self._scatter / max(1, self.count - 1)


def frechet_distance(one: Moments, other: Moments) -> float:
    """Frechet distance of the two Gaussians that have these means and covariances; squared, as is usual.

        |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^1/2 C2 C1^1/2)^1/2)

    The trace of the root is the sum of the roots of eigenvalues, which are those of ``C1 C2``; both matrices are
    symmetric, so that no root of a general matrix is taken and nothing imaginary can come up.

    Args:
        one: of at least two pictures.
        other: the same.

    Returns:
        At least 0.

    Raises:
        ValueError: fewer than two pictures, or different numbers of features.
    """
    if min(one.count, other.count) < 2 or one.mean.shape != other.mean.shape:
        raise ValueError("two sets of at least two pictures with as many features each")
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = root @ other.covariance @ root
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    distance = (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace() - 2 * cross
    return max(0.0, float(distance))
