"""The trainer: discriminator and generator by turns, each a plain loop over windows of micro-batches.

Both networks are wrapped in DDP and registered with distopt, each on its own. The one whose turn it is runs forward
through its wrapper, once a micro-batch; the other runs bare, frozen, and moves no spectral norm. DDP broadcasts no
buffers: spectral norms are functions of weights that are equal on all ranks, and batch norms use each rank's own
micro-batch.
"""

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt import checkpoint
from distopt.errors import StateError
from distopt.optim.averaging import IterateAverage

from .alarm import CollapseAlarm, Warned
from .batches import Batches, Compared, Drawn
from .discriminator import Discriminator
from .freezing import frozen
from .generator import Generator
from .losses import discriminator_hinge, generator_hinge, gradient_penalty
from .orthogonal import add_penalty_gradient, start_orthogonal
from .settings import TrainSettings
from .spectra import top_singular_values_of
from .spectral import held, settle

_BETAS = (0.0, 0.999)
_FORWARD_SYNC = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BROADCAST: dict[str, Any] = {"forward_sync_buffers" if _FORWARD_SYNC else "broadcast_buffers": False}
"""Buffers are not sent before forward. torch 2.13 has another name for it, and warns of the old one."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What is read after a step; all of it is empty between readings, so that these cost nothing.

    Args:
        losses: mean losses over all ranks, by network.
        spectra: top three singular values of every weight by ``generator.`` or ``discriminator.`` and its name.
        warned: what the alarm said.
    """

    losses: Mapping[str, float]
    spectra: Mapping[str, tuple[float, ...]]
    warned: tuple[Warned, ...]


class Trainer:
    """A generator and a discriminator in training. Every rank makes one, at the same point.

    Args:
        settings: how; its batch is a multiple of ranks times micro-batches.
        pictures: all there are, ``(N, 3, size, size)`` in [-1, 1].
        classes: theirs, int64 ``(N,)``, from 0.
        device: where to train.

    Raises:
        SettingError: sizes, or batch and ranks, do not fit together.
    """

    def __init__(
        self, settings: TrainSettings, pictures: Tensor, classes: Tensor, device: torch.device | str = "cpu"
    ) -> None:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        settings.check_ranks(ranks)
        self.settings, self.taken, self.skipped = settings, 0, 0
        self.sizes = settings.sizes(int(classes.max()) + 1, pictures.shape[-1])
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(settings.seed)
            self.generator, self.discriminator = (
                start_orthogonal(network).to(device)
                for network in (Generator(self.sizes), Discriminator(self.sizes, settings.group))
            )
        with torch.no_grad():
            # As long as noise of its width: both enter the same linear layers of norm 1, and a class of length 1 would
            # be drowned for thousands of steps.
            self.generator.classes.weight.mul_(math.sqrt(settings.shared))
        for network in (self.generator, self.discriminator):
            settle(network)
        self._generator, self.generator_registration = _distributed(self.generator, settings)
        self._discriminator, self.discriminator_registration = _distributed(self.discriminator, settings)
        self._generator_optimizer, self._discriminator_optimizer = (
            torch.optim.Adam(network.parameters(), betas=_BETAS) for network in (self.generator, self.discriminator)
        )
        self.average = IterateAverage(self.generator, decay=settings.averaging, every=1, device=device)
        self._alarm = CollapseAlarm()
        self._share = range(rank * settings.accumulate, (rank + 1) * settings.accumulate)
        self._batches = Batches(
            pictures,
            classes,
            settings.noise,
            batch=settings.batch,
            parts=ranks * settings.accumulate,
            seed=settings.seed,
            device=device,
        )
        self._windows: tuple[Iterator[distopt.Window[Compared]], Iterator[distopt.Window[Drawn]]] | None = None

    def step(self) -> Progress:
        """Take one step of the generator, after those of the discriminator. Collective."""
        compared, drawn = self._windows = self._windows or self._cut()
        settings = self.settings
        for _ in range(settings.discriminator_steps):
            comparing = next(compared)
            self._learn(self.discriminator, comparing, self._comparing_loss)
            self._move(self.discriminator, self._discriminator_optimizer, settings.discriminator_rate)
        drawing = next(drawn)
        with frozen(self.discriminator), held(self.discriminator):
            self._learn(self.generator, drawing, self._drawing_loss)
        # Behind the reduction: it is the same on all ranks as it is.
        embedding = self.generator.classes.weight
        add_penalty_gradient((p for p in self.generator.parameters() if p is not embedding), settings.orthogonal)
        if self._move(self.generator, self._generator_optimizer, settings.generator_rate):
            self.average.update()
        self.taken += 1
        if self.taken % settings.readings_every and self.taken != settings.steps:
            return Progress({}, {}, ())
        losses = {"discriminator": float(comparing.loss()), "generator": float(drawing.loss())}
        return Progress(losses, spectra := self.spectra(), tuple(self._alarm.read(self.taken, spectra)))

    def spectra(self) -> dict[str, tuple[float, ...]]:
        """Top three singular values of every weight of both networks, before normalisation."""
        return {
            f"{whose}.{name}": values
            for whose, network in (("generator", self.generator), ("discriminator", self.discriminator))
            for name, values in top_singular_values_of(network).items()
        }

    def save(self, folder: Path, keep: int = 2, **more: Any) -> None:
        """Save everything that decides the rest of the run. Collective.

        Args:
            folder: of the run's checkpoints.
            keep: how many checkpoints are kept.
            more: what else is to be saved, see `distopt.checkpoint.save`.
        """
        facts = {"taken": self.taken, "skipped": self.skipped, "ranks": _ranks()}
        registrations = self._registrations()
        own = {name: registration.own_residuals() for name, registration in registrations.items()}
        states = {"own": checkpoint.PerRank(checkpoint.Value(own))} if own else {}
        checkpoint.save(folder, self.taken, keep=keep, facts=facts, **self._states(), **states, **more)
        # A registration's state holds the mean of the residuals, which it takes over when it is saved.
        for name, registration in registrations.items():
            registration.load_own_residuals(own[name])

    def load(self, folder: Path, **more: Any) -> None:
        """Go on from the newest checkpoint: bit for bit on as many ranks. Collective, before the first step.

        Raises:
            CheckpointError: all are damaged.
            StateError: a step was taken before.
        """
        if self._windows is not None:
            raise StateError("load: a step was taken before")
        facts: dict[str, Any] = {}
        checkpoint.load(folder, facts=facts, **self._states(), **more)
        if facts["ranks"] == _ranks() and (registrations := self._registrations()):
            own = checkpoint.Value()
            checkpoint.load(folder, rng=False, own=checkpoint.PerRank(own))
            for name, registration in registrations.items():
                registration.load_own_residuals(own.value[name])
        self.taken, self.skipped = facts["taken"], facts["skipped"]

    def _states(self) -> dict[str, Any]:
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "generator_optimizer": self._generator_optimizer,
            "discriminator_optimizer": self._discriminator_optimizer,
            "average": self.average,
            "alarm": self._alarm,
            **self._registrations(),
        }

    def _registrations(self) -> dict[str, distopt.Registration]:
        both = {"generator": self.generator_registration, "discriminator": self.discriminator_registration}
        return {f"{name}_registration": each for name, each in both.items() if each is not None}

    def _cut(self) -> tuple[Iterator["distopt.Window[Compared]"], Iterator["distopt.Window[Drawn]"]]:
        steps, turns = range(self.taken, self.settings.steps), range(self.settings.discriminator_steps)
        compared = (
            part for step in steps for turn in turns for part in self._batches.to_compare(step, turn, self._share)
        )
        drawn = (part for step in steps for part in self._batches.to_draw(step, self._share))
        parts = self.settings.accumulate
        return (
            iter(distopt.accumulate(compared, self._discriminator, steps=parts)),
            iter(distopt.accumulate(drawn, self._generator, steps=parts)),
        )

    def _learn(self, network: nn.Module, window: Any, loss_of: Callable[[Any], Tensor]) -> None:
        """Leave the gradient of a window in a network, whose spectral norms take one power iteration for it."""
        for number, part in enumerate(window):
            with held(network) if number else contextlib.nullcontext():
                window.backward(loss_of(part))

    def _comparing_loss(self, part: Compared) -> Tensor:
        with torch.no_grad(), held(self.generator):
            fake = self.generator(part.drawn.noise, part.drawn.classes)
        gamma = self.settings.gamma
        real = part.pictures.requires_grad_(gamma > 0)
        scores = self._discriminator(torch.cat([real, fake]), torch.cat([part.classes, part.drawn.classes]))
        of_real, of_fake = scores.split([len(real), len(fake)])
        loss = discriminator_hinge(of_real, of_fake, "sum")
        return loss + gradient_penalty(of_real, real, gamma, "sum") if gamma > 0 else loss

    def _drawing_loss(self, part: Drawn) -> Tensor:
        return generator_hinge(self.discriminator(self._generator(part.noise, part.classes), part.classes), "sum")

    def _move(self, network: nn.Module, optimizer: torch.optim.Optimizer, rate: float) -> bool:
        """Let the optimizer step, unless a gradient is not finite, which it is on all ranks or none."""
        falling = self.settings.decay * self.settings.steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (self.settings.steps - self.taken) / falling) if falling else rate
        norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        if finite := bool(norm.isfinite()):
            optimizer.step()
        else:
            self.skipped += 1
        optimizer.zero_grad()
        return finite


def reducer_of(settings: TrainSettings) -> distopt.PowerSGD | distopt.AllReduce:
    """What averages the gradients that settings ask for; vectors, batch norms and embeddings are sent whole anyway."""
    return distopt.PowerSGD(rank=settings.rank) if settings.reducer == "powersgd" else distopt.AllReduce()


def _distributed(network: nn.Module, settings: TrainSettings) -> tuple[nn.Module, distopt.Registration | None]:
    if not dist.is_initialized():
        return network, None
    device = next(network.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(network, device_ids=ids, **_NO_BROADCAST)
    return wrapped, distopt.register(wrapped, reducer_of(settings))


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
