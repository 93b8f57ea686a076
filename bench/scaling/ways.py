"""Ways to scale gradients: not at all, one scale for everything, or one for each residual branch."""

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from bench.scaling.network import Network
from distopt import ResblockScaler
from distopt.scaling import ScalePolicy
from distopt.scaling.policy import Preset


class Scaler(Protocol):
    """What a training loop needs."""

    def scale(self, loss: Tensor) -> Tensor:
        """Give what is to be differentiated."""
        ...

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Unscale and step; tell whether the step was skipped."""
        ...

    def octaves(self) -> list[float]:
        """Give log2 of the scales, one a branch, or just one."""
        ...


class Way(Protocol):
    """A way to scale."""

    def attach(self, network: Network) -> Scaler:
        """Prepare a network."""
        ...


@dataclasses.dataclass(frozen=True)
class Float32:
    """Branches in float32, no scale: what the others are measured by."""

    def attach(self, network: Network) -> Scaler:
        """See `Way.attach`."""
        return _Plain()


@dataclasses.dataclass(frozen=True)
class OneScale:
    """Branches in float16 by autocast, and ``torch.amp.GradScaler``.

    Args:
        initial: octaves at the start.
        interval: clean steps after which the scale is doubled.
    """

    initial: float = 16.0
    interval: int = 2000

    def attach(self, network: Network) -> Scaler:
        """See `Way.attach`."""
        network.halves = True
        return _One(torch.amp.GradScaler("cpu", init_scale=2.0**self.initial, growth_interval=self.interval))


@dataclasses.dataclass(frozen=True)
class PerBranch:
    """Branches in float16, with ``distopt.ResblockScaler``.

    Args:
        preset: its policy.
    """

    preset: Preset | ScalePolicy = "default"

    def attach(self, network: Network) -> Scaler:
        """See `Way.attach`."""
        return _Each(ResblockScaler(network.branches, preset=self.preset, measure_every=0))


class _Plain:
    def scale(self, loss: Tensor) -> Tensor:
        return loss

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        optimizer.step()
        return False

    def octaves(self) -> list[float]:
        return [0.0]


class _One:
    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler = scaler

    def scale(self, loss: Tensor) -> Tensor:
        return self._scaler.scale(loss)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        before = self._scaler.get_scale()
        self._scaler.unscale_(optimizer)
        self._scaler.step(optimizer)
        self._scaler.update()
        return self._scaler.get_scale() < before

    def octaves(self) -> list[float]:
        return [torch.tensor(self._scaler.get_scale()).log2().item()]


class _Each:
    def __init__(self, scaler: ResblockScaler) -> None:
        self._scaler = scaler

    def scale(self, loss: Tensor) -> Tensor:
        return self._scaler.scale(loss)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        self._scaler.step(optimizer)
        self._scaler.update()
        return self._scaler.skipped

    def octaves(self) -> list[float]:
        return torch.tensor(list(self._scaler.scales().values()), dtype=torch.float64).log2().tolist()
