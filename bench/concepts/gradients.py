"""Real gradients, for want of which a picture would show what was put into it."""

from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


def of_digits(steps: int, width: int = 128) -> Iterator[Tensor]:
    """Train a network of three layers on handwritten digits, and give the gradient of the middle one at every step.

    Args:
        steps: of Adam, on 60 pictures each.
        width: of the hidden layers.

    Returns:
        Gradients, ``(width, width)`` float64.
    """
    pictures, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(digits), (60,), generator=draws)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pictures[batch].float() / 16), digits[batch]).backward()
        yield model[2].weight.grad.double()
        optimizer.step()


class Branches(nn.Module):
    """Eight residual branches, with a second loss after the fourth that weighs 2^exit times as much as the last.

    Args:
        exit: octaves between the two losses.
    """

    def __init__(self, exit: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList([_branch() for _ in range(8)])
        self.exit = exit

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, 64)`` to the loss."""
        early = x
        for number, branch in enumerate(self.branches):
            x = x + branch(x)
            early = x if number == 3 else early
        return 2.0**self.exit * early.square().mean() + x.square().mean()


def _branch() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))


def of_branches(exit: int) -> tuple[Tensor, Tensor]:
    """Give the weight gradients of the last branch before the second loss, and of the first one behind it.

    Args:
        exit: octaves by which the second loss weighs more than the last.
    """
    model = Branches(exit)
    model(torch.randn(32, 64, generator=torch.Generator().manual_seed(0))).backward()
    before, behind = (
        torch.cat([p.grad.flatten() for p in model.branches[number].parameters() if p.dim() == 2]) for number in (3, 4)
    )
    return before, behind
