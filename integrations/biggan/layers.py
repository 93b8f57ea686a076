"""What generator and discriminator are made of: conditional batch norm, self-attention, changes of resolution."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias are linear functions of a condition: ``normed * (1 + gain(c)) + bias(c)``.

    Statistics are those of the rank's own micro-batch.

    Args:
        channels: of the pictures.
        condition: width of the condition.

    Example:
        >>> norm = ConditionalBatchNorm(8, 5)
        >>> norm(torch.randn(2, 8, 4, 4), torch.randn(2, 5)).shape
        torch.Size([2, 8, 4, 4])

    Source: Brock et al. 2019 (arXiv:1809.11096), section 3.1 and appendix B.1.
    """

    def __init__(self, channels: int, condition: int) -> None:
        super().__init__()
        self.normed = nn.BatchNorm2d(channels, affine=False, eps=1e-4)
        self.gain = nn.Linear(condition, channels, bias=False)
        self.bias = nn.Linear(condition, channels, bias=False)

    def forward(self, pictures: Tensor, condition: Tensor) -> Tensor:
        """Normalise ``(n, channels, H, W)`` under ``(n, condition)``."""
        gain, bias = 1 + self.gain(condition), self.bias(condition)
        return self.normed(pictures) * gain[:, :, None, None] + bias[:, :, None, None]


class SelfAttention(nn.Module):
    """Every place looks at every other one, and adds what it finds by a learned gain that starts at 0.

    Keys and values are taken from the picture at half its resolution.

    Args:
        channels: at least 8.

    Example:
        >>> picture = torch.randn(2, 16, 8, 8)
        >>> bool((SelfAttention(16)(picture) == picture).all())
        True

    Source: Zhang et al. 2019 (arXiv:1805.08318), section 3, with the pooling of BigGAN.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.key = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.value = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.out = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, pictures: Tensor) -> Tensor:
        """``(n, channels, H, W)`` with even sides to the same shape."""
        query = self.query(pictures).flatten(2)
        key = functional.max_pool2d(self.key(pictures), 2).flatten(2)
        value = functional.max_pool2d(self.value(pictures), 2).flatten(2)
        attended = value @ (query.transpose(1, 2) @ key).softmax(-1).transpose(1, 2)
        return pictures + self.gain * self.out(attended.unflatten(2, pictures.shape[2:]))


def doubled(pictures: Tensor) -> Tensor:
    """Every pixel four times: ``(n, c, H, W)`` to ``(n, c, 2H, 2W)``."""
    return functional.interpolate(pictures, scale_factor=2)


def halved(pictures: Tensor) -> Tensor:
    """The mean of every four pixels: ``(n, c, 2H, 2W)`` to ``(n, c, H, W)``."""
    return functional.avg_pool2d(pictures, 2)


def kernel(before: int, after: int, side: int) -> nn.Conv2d:
    """A convolution that keeps the resolution."""
    return nn.Conv2d(before, after, side, padding=side // 2)
