"""DALL-E's learning rate: a linear warm-up, then halved when the loss stalls, a set number of times."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau

from distopt.optim.settings import check_count, check_number


class WarmupThenHalve:
    """Raise the learning rate linearly, then halve it whenever the loss has stopped to fall.

    Step ``t`` of the warm-up, from 1, has ``t / warmup`` of each group's learning rate; torch's ``LinearLR`` does
    that. After it, the mean of every ``window`` losses is given to torch's ``ReduceLROnPlateau``: when ``patience``
    means in a row have not fallen below the best one by the part ``threshold`` of it, the next such mean halves the
    learning rate.

    With several ranks, **the loss must be the same on all of them**, averaged by an all-reduce for example: ranks with
    different losses would end up with different learning rates. With torch's convention, call `step` after
    ``optimizer.step()``.

    Args:
        optimizer: its groups' learning rates are those after the warm-up. Those groups may not grow in number.
        warmup: steps; 5000 in the paper. 0 or 1: none.
        halvings: at most so many; 5 in the paper, by hand.
        window: losses that are averaged before they are compared; 1 for a loss that is no single batch's.
        patience: means that may be no better, at least 0.
        threshold: what counts as better, relative, at least 0.

    Raises:
        SettingError: a setting is out of its range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        >>> schedule = WarmupThenHalve(optimizer, warmup=2, window=1, patience=0)
        >>> rates = []
        >>> for loss in (3.0, 2.0, 1.0, 1.0, 1.0):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     schedule.step(loss)
        >>> rates, schedule.halvings
        ([0.5, 1.0, 1.0, 1.0, 0.5], 2)

    Source: Ramesh et al. 2021 (arXiv:2102.12092), appendix B.2.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup: int = 5000,
        halvings: int = 5,
        window: int = 100,
        patience: int = 10,
        threshold: float = 1e-3,
    ) -> None:
        check_count("WarmupThenHalve.warmup", warmup, 0)
        check_count("WarmupThenHalve.halvings", halvings, 0)
        check_count("WarmupThenHalve.window", window, 1)
        check_count("WarmupThenHalve.patience", patience, 0)
        check_number("WarmupThenHalve.threshold", threshold, 0)
        self._optimizer, self._most, self._window = optimizer, halvings, window
        self._plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=patience, threshold=threshold, eps=0)
        self._left = max(warmup - 1, 0)
        self._warmup = LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1) if warmup > 1 else None
        self._halvings = self._losses = 0
        self._sum: float | Tensor = 0.0

    @property
    def halvings(self) -> int:
        """How often the learning rate has been halved."""
        return self._halvings

    def step(self, loss: float | Tensor | None = None) -> None:
        """Count an optimizer step.

        Args:
            loss: of this step, the same on all ranks; a tensor stays on its device until a window is complete. Ignored
                during the warm-up. Without it nothing is halved. A window whose mean is not finite is left out.
        """
        if self._warmup is not None and self._left:
            self._left -= 1
            self._warmup.step()
            return
        if loss is None:
            return
        self._sum = self._sum + (loss.detach().float() if isinstance(loss, Tensor) else loss)
        self._losses += 1
        if self._losses < self._window:
            return
        mean = float(self._sum) / self._losses
        self._sum, self._losses = 0.0, 0
        if math.isfinite(mean) and self._halvings < self._most:
            before = self._rates()
            self._plateau.step(mean)
            self._halvings += int(self._rates() != before)

    def state_dict(self) -> dict[str, Any]:
        """Give all that decides the learning rates from here on, and those of now."""
        return {
            "rates": self._rates(),
            "left": self._left,
            "warmup": self._warmup and self._warmup.state_dict(),
            "plateau": self._plateau.state_dict(),
            "halvings": self._halvings,
            "losses": self._losses,
            "sum": float(self._sum),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, with its learning rates: before or after the optimizer's state is loaded."""
        self._left, self._halvings, self._losses = state["left"], state["halvings"], state["losses"]
        self._sum = state["sum"]
        self._plateau.load_state_dict(state["plateau"])
        if self._warmup is not None and state["warmup"]:
            self._warmup.load_state_dict(state["warmup"])
        for group, rate in zip(self._optimizer.param_groups, state["rates"], strict=True):
            group["lr"] = rate

    def _rates(self) -> list[float]:
        return [float(group["lr"]) for group in self._optimizer.param_groups]
