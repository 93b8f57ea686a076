"""A bag's features as a weighted mean of those of its instances."""

import math

import torch
from torch import Tensor, nn

from .masks import check_count, checked_mask


class AttentionPooling(nn.Module):
    """A weighted mean of the instances' features, whose weights are learned, and a linear layer.

    It takes features ``(B, N, D)``, not log-odds, and is not monotone: a bag can be made less likely by adding an
    instance (arXiv:2310.17867).

    Args:
        features: D.
        classes: C.
        hidden: width of the layer that scores instances.
        gated: whether a second, sigmoid layer multiplies it.

    Raises:
        SettingError: a size is not an integer of at least 1.

    Example:
        >>> AttentionPooling(8, 3)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 3])

    Source: Ilse, Tomczak and Welling 2018 (arXiv:1802.04712), equations 8 and 9.
    """

    def __init__(self, features: int, classes: int, *, hidden: int = 32, gated: bool = False) -> None:
        super().__init__()
        for name, value in (("features", features), ("classes", classes), ("hidden", hidden)):
            check_count(f"AttentionPooling.{name}", value)
        self.tanh = nn.Linear(features, hidden)
        self.gate = nn.Linear(features, hidden) if gated else None
        self.score = nn.Linear(hidden, 1)
        self.head = nn.Linear(features, classes)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features ``(B, N, D)`` and a mask ``(B, N)`` to log-odds ``(B, C)``; errors as `Pooling.forward`'s."""
        mask = checked_mask(features, mask)
        kept = features.masked_fill(~mask.unsqueeze(-1), 0.0)
        hidden = torch.tanh(self.tanh(kept))
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(kept))
        scores = self.score(hidden).masked_fill(~mask.unsqueeze(-1), -math.inf)
        return self.head((scores.softmax(1) * kept).sum(1))
