"""One network learns while the other only judges or draws."""

import contextlib
from collections.abc import Generator

from torch import nn


@contextlib.contextmanager
def frozen(model: nn.Module) -> Generator[None]:
    """Let gradients pass through a model, but not into its parameters.

    Example:
        >>> import torch
        >>> critic, x = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
        >>> with frozen(critic):
        ...     critic(x).sum().backward()
        >>> critic.weight.grad is None, x.grad is None
        (True, False)
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
