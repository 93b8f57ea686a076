"""A small residual network with branches that can be told to misbehave."""

import torch
from torch import nn

WIDTH = 8


class Branch(nn.Module):
    """LayerNorm and an MLP; ``amplify`` multiplies gradients in its middle."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.amplify = 1.0

    def forward(self, x):
        hidden = torch.nn.functional.gelu(self.up(self.norm(x)))
        if self.amplify != 1.0:
            hidden.register_hook(lambda gradient: gradient * self.amplify)
        return self.down(hidden)


class Residual(nn.Module):
    """x + f(x), several times, between two float32 layers."""

    def __init__(self, depth=4, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inlet = nn.Linear(WIDTH, WIDTH)
            self.branches = nn.ModuleList(Branch() for _ in range(depth))
            self.head = nn.Linear(WIDTH, 1)

    def forward(self, x):
        x = self.inlet(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x)


def batch(seed=0, n=16):
    """Inputs ``(n, WIDTH)``."""
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss_of(model, x):
    """A loss that is large enough for gradients of about 1."""
    return (model(x) - 1).square().mean()


def relative_error(model, reference):
    """The worst relative error of a parameter's gradient."""
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max(float((a.grad.float() - b.grad).norm() / b.grad.norm().clamp(min=1e-20)) for a, b in pairs)
