"""Several tasks in one loss, each weighted by a variance that is learned beside the model.

    symbol  here               shape  meaning
    L       losses             ()     mean loss of one task
    s       log_variances      (T,)   ln of the task's variance, learned from 0

A regression of squared errors is the likelihood of a Gaussian, ``L / (2 var) + ln(var) / 2``; a classification that of
a softmax at temperature ``var``, about ``L / var + ln(var) / 2``. Learned as s = ln(var), both weights stay positive.

The optimum for a loss of exactly 0, which a cross-entropy in float32 reaches, is s = -infinity; on the way there the
weight would be infinite, and the sum NaN. So s counts as `LEAST` where it is less.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distopt.errors import SettingError

from .clamping import clamped

LEAST = -30.0
"""Least value that s counts as, the optimum for a loss of 1e-13."""
KINDS = ("regression", "classification")
FORMS = ("likelihood", "revised")
Kind = Literal["regression", "classification"]


class UncertaintyWeights(nn.Module):
    """Weights tasks by learned variances.

    Put it *inside* the module that DDP wraps: outside, each rank would follow its own data, and the weights would drift
    apart. Give its parameter to the optimizer by `parameter_groups`: weight decay would pull every variance to 1.

    Args:
        tasks: "regression" (a mean of squared errors) or "classification" (a mean cross-entropy), by the task's name.
        form: "likelihood" is ``exp(-s) L / 2 + s / 2``, and ``exp(-s) L + s / 2`` for a classification; "revised"
            is ``exp(-s) L / 2 + ln(1 + exp(s))`` for both, which is never negative.

    Raises:
        SettingError: there is no task, or one is of another kind, or ``form`` is not allowed.

    Example:
        >>> weights = UncertaintyWeights({"depth": "regression", "class": "classification"})
        >>> weights({"depth": torch.tensor(4.0), "class": torch.tensor(2.0)}).item()
        4.0
        >>> weights.weights()
        {'depth': 0.5, 'class': 1.0}

    Source: Kendall, Gal and Cipolla 2018 (arXiv:1705.07115), equations 7 and 10; the revised form is that of Liebel and
    Koerner 2018 (arXiv:1805.06334).
    """

    def __init__(self, tasks: Mapping[str, str], *, form: str = "likelihood") -> None:
        super().__init__()
        if not isinstance(tasks, Mapping) or not tasks:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError("tasks", tasks, "a dictionary with at least one task")
        for name, kind in tasks.items():
            if kind not in KINDS:
                raise SettingError(f"tasks[{name!r}]", kind, "one of " + ", ".join(KINDS))
        if form not in FORMS:
            raise SettingError("form", form, "one of " + ", ".join(FORMS))
        self.tasks = dict(tasks)
        self.form = form
        self.log_variances = nn.Parameter(torch.zeros(len(tasks)))
        """``(T,)`` float32, in the order of ``tasks``."""

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The sum over tasks, of their mean losses.

        Args:
            losses: ``()`` by task; 16-bit losses are taken to float32.

        Returns:
            ``()``, float32 or float64.

        Raises:
            SettingError: other tasks than the module's, or a loss that is not one number.
        """
        return torch.stack(list(self.terms(losses).values())).sum()

    def terms(
        self, sums: Mapping[str, Tensor], counts: Mapping[str, float | Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Each task's part, for ``window.backward`` of `distopt.accumulate`, which divides it by its own count.

        Args:
            sums: ``()`` by task: the loss added up over ``counts`` labels; tasks may have different numbers of them.
            counts: labels by task; without them, ``sums`` are means.

        Returns:
            ``()`` by task: the weighted sum, and ``counts`` times what keeps the variance from growing. Divided by
            the counts of a window, it is what `forward` gives for the window's means.

        Raises:
            SettingError: see `forward`.
        """
        for told, given in (("losses", sums), ("counts", counts)):
            if given is not None and set(given) != set(self.tasks):
                raise SettingError(told, list(given), f"of these tasks, {list(self.tasks)}")
        parts: dict[str, Tensor] = {}
        bounded = clamped(self.log_variances, LEAST)
        for index, (name, kind) in enumerate(self.tasks.items()):
            if not isinstance(sums[name], Tensor) or sums[name].dim() != 0:
                told = tuple(sums[name].shape) if isinstance(sums[name], Tensor) else sums[name]
                raise SettingError(f"losses[{name!r}]", told, "a tensor of one number, of shape ()")
            loss = sums[name] if sums[name].dtype == torch.float64 else sums[name].float()
            s = bounded[index].to(loss.dtype)
            part = self._factor(kind) * torch.exp(-s) * loss
            parts[name] = part + self._price(s) * (1.0 if counts is None else counts[name])
        return parts

    @torch.no_grad()
    def start(self, losses: Mapping[str, float]) -> None:
        """Set each s to its optimum for these losses, say those of the first batch; the same ones on all ranks.

        From 0, a loss of 10,000 has a gradient of 5,000 in s. Adam's second moment remembers it for ``1 / (1 - beta2)``
        steps, in which s hardly moves while the other tasks starve: start near the optimum, or give `parameter_groups`
        a short memory.

        Args:
            losses: means by task, all above 0.

        Raises:
            SettingError: other tasks than the module's, or a loss that is not above 0 and finite.
        """
        if set(losses) != set(self.tasks):
            raise SettingError("losses", list(losses), f"of these tasks, {list(self.tasks)}")
        best = self.optimum(losses)
        self.log_variances.copy_(torch.tensor([best[name] for name in self.tasks]))

    def weights(self) -> dict[str, float]:
        """What each task's loss is multiplied by now."""
        values = torch.exp(-self.log_variances.detach().clamp_min(LEAST)).tolist()
        return {
            name: self._factor(kind) * value for (name, kind), value in zip(self.tasks.items(), values, strict=True)
        }

    def optimum(self, losses: Mapping[str, float]) -> dict[str, float]:
        """The s at which the sum is smallest while the losses stay as they are, all above 0.

        Args:
            losses: means by task; not all tasks need be there.

        Raises:
            SettingError: another task than the module's, or a loss that is not above 0 and finite.

        Example:
            >>> weights = UncertaintyWeights({"depth": "regression", "class": "classification"})
            >>> {name: round(s, 4) for name, s in weights.optimum({"depth": 0.25, "class": 2.0}).items()}
            {'depth': -1.3863, 'class': 1.3863}
        """
        for name, loss in losses.items():
            if name not in self.tasks:
                raise SettingError("losses", list(losses), f"of these tasks, {list(self.tasks)}")
            if not (math.isfinite(loss) and loss > 0):
                raise SettingError(f"losses[{name!r}]", loss, "a finite number above 0")
        return {name: math.log(self._variance(self.tasks[name], loss)) for name, loss in losses.items()}

    def _variance(self, kind: str, loss: float) -> float:
        if self.form == "revised":  # the positive root of v^2 = (1 + v) loss / 2
            return loss / 4 + math.sqrt(loss**2 / 16 + loss / 2)
        return 2 * self._factor(kind) * loss

    def _factor(self, kind: str) -> float:
        return 1.0 if kind == "classification" and self.form == "likelihood" else 0.5

    def _price(self, s: Tensor) -> Tensor:
        return nn.functional.softplus(s) if self.form == "revised" else 0.5 * s


def parameter_groups(
    modules: nn.Module | Iterable[nn.Module],
    *,
    weight_decay: float,
    learning_rate: float | None = None,
    betas: tuple[float, float] | None = None,
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the model's parameters, and the log-variances, which never decay.

    Args:
        modules: a module that holds `UncertaintyWeights`, wrapped or not, or several modules.
        weight_decay: of all parameters but the log-variances.
        learning_rate: of the log-variances; the optimizer's own if ``None``.
        betas: of the log-variances, in an optimizer of Adam's kind; the optimizer's own if ``None``.

    Raises:
        SettingError: there are no `UncertaintyWeights` among the modules.

    Example:
        >>> groups = parameter_groups(UncertaintyWeights({"depth": "regression"}), weight_decay=0.1)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(0, 0.1), (1, 0.0)]
    """
    listed = [modules] if isinstance(modules, nn.Module) else list(modules)
    inside = [part for module in listed for part in module.modules()]
    own = {id(part.log_variances): part.log_variances for part in inside if isinstance(part, UncertaintyWeights)}
    if not own:
        raise SettingError("modules", [type(module).__name__ for module in listed], "modules with UncertaintyWeights")
    others = {id(p): p for module in listed for p in module.parameters() if id(p) not in own and p.requires_grad}
    rules = {name: value for name, value in (("lr", learning_rate), ("betas", betas)) if value is not None}
    return [
        {"params": list(others.values()), "weight_decay": weight_decay},
        {"params": list(own.values()), "weight_decay": 0.0, **rules},
    ]
