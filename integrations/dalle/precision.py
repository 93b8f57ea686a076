"""Training in 16 bits: everything in which a stage's step differs from one in float32.

In bf16 and fp16 products run in 16 bits, gradients are scaled, the optimizer's moments are 1-6-9 and 0-6-10, and so are
the residuals of PowerSGD; the parameters are kept in float32 and cast where they are used. On the CPU, which seldom has
16-bit products, they are emulated.

Source: Ramesh et al. 2021 (arXiv:2102.12092), section 2.4 and appendix D.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import distopt
from distopt.numerics.emulation import emulated_16bit

from .context import Context

_MAX_VARIANCE = 5.0
"""Appendix B.2: the running variance is clipped by value before it is used."""
_RECORDS = 200
"""Times in a run that the scales are noted."""


class Scaler(Protocol):
    """What scales gradients: the loop of a ``GradScaler``, and word of what became of a step."""

    @property
    def skipped(self) -> bool:
        """Whether the step before the last ``update`` was skipped."""
        ...

    def scale(self, outputs: Tensor) -> Tensor:
        """Scale a loss, if losses are what is scaled."""
        ...

    def unscale_(self, optimizer: Optimizer) -> None:
        """Take the scales off the gradients."""
        ...

    def step(self, optimizer: Optimizer) -> Any:
        """Let the optimizer step, unless a gradient is not finite."""
        ...

    def update(self) -> None:
        """Let the scales follow."""
        ...

    def scales(self) -> Mapping[str, float]:
        """The scales, by name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What decides the scales from now on, for a checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        ...


class LossScaler(torch.amp.GradScaler):
    """One scale for the whole loss, as PyTorch has it; without ``enabled``, none at all."""

    skipped = False

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """See ``torch.amp.GradScaler``, which lowers the scale after a skipped step and at no other time."""
        before = self.get_scale()
        super().update(new_scale)
        self.skipped = self.get_scale() < before

    def scales(self) -> dict[str, float]:
        """The scale, by the name of what it scales; empty without ``enabled``."""
        return {"loss": self.get_scale()} if self.is_enabled() else {}


class Stepper:
    """Takes the optimizer steps of a stage.

    Args:
        parameters: those whose gradients are clipped together.
        optimizer: what steps.
        scaler: what scales their gradients.
        clip: largest global norm of the gradient; 0 for none.
        steps: how many there will be, taken or skipped.
        context: where they are computed, and in how many bits.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: Optimizer,
        scaler: Scaler,
        clip: float,
        steps: int,
        context: Context,
    ) -> None:
        self._parameters = list(parameters)
        self._optimizer, self._scaler, self._clip, self._context = optimizer, scaler, clip or math.inf, context
        self._steps, self._every = steps, max(1, steps // _RECORDS)
        self.taken = 0
        self.skipped = 0
        self.scales: list[tuple[int, dict[str, float]]] = []
        """Steps, and the scales after them by name; noted some two hundred times in a run."""

    def state_dict(self) -> dict[str, Any]:
        """What has been counted and noted, for a checkpoint."""
        return {"taken": self.taken, "skipped": self.skipped, "scales": self.scales}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.taken, self.skipped, self.scales = state["taken"], state["skipped"], state["scales"]

    def products(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which forward and backward run."""
        emulated = self._context.precision != "fp32" and self._context.device.type == "cpu"
        return emulated_16bit() if emulated else contextlib.nullcontext()

    def step(self, learning_rate: float) -> bool:
        """Let the optimizer step, after backward.

        Returns:
            Whether it did. It skips a step in which a scaled gradient is not finite, on all ranks alike.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._scaler.unscale_(self._optimizer)
        nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        skipped = self._scaler.skipped
        self.skipped, self.taken = self.skipped + skipped, self.taken + (not skipped)
        return not skipped

    def values(self) -> dict[str, float]:
        """What the journal is told after a step: how many were skipped, and now and then the scales, in octaves."""
        if self._context.precision == "fp32":
            return {}
        step = self.taken + self.skipped - 1
        if step % self._every and step + 1 != self._steps:
            return {"skipped": self.skipped}
        scales = dict(self._scaler.scales())
        self.scales.append((step, scales))
        octaves = {f"log2 scale/{name}": math.log2(scale) for name, scale in scales.items()}
        return {"skipped": self.skipped, **octaves}


def adamw(groups: Iterable[Any], context: Context, **rules: Any) -> Optimizer:
    """AdamW; in 16 bits with 16-bit moments, but for vectors and embeddings.

    Args:
        groups: named parameters, or groups of them.
        context: in how many bits.
        rules: ``lr``, ``betas`` and ``weight_decay``.
    """
    if context.precision == "fp32":
        return torch.optim.AdamW(groups, **rules, fused=True)
    return distopt.optim.AdamW(groups, **rules, moments="packed16", max_variance=_MAX_VARIANCE)


def reducer(
    name: str, rank: int, precision: str, *, wire: str = "float32", separate: bool = False
) -> distopt.AllReduce | distopt.PowerSGD:
    """How gradients are averaged; in 16 bits with 16-bit residuals and factors.

    Args:
        name: "allreduce" or "powersgd".
        rank: of PowerSGD.
        precision: "fp32", "bf16" or "fp16".
        wire: what PowerSGD's factors travel in: "float32", "bfloat16" or "float16".
        separate: whether PowerSGD takes queries, keys and values apart.

    Example:
        >>> reducer("powersgd", 4, "fp16").residual_dtype
        '1-6-9'
    """
    if name == "allreduce":
        return distopt.AllReduce()
    kept = None if precision == "fp32" else "1-6-9"
    return distopt.PowerSGD(
        rank=rank,
        residual_dtype=kept,
        factor_dtype=kept,
        wire_dtype=None if wire == "float32" else getattr(torch, wire),
        stacked={"*.attention_in.weight": 3} if separate else None,
    )
