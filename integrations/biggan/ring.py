"""Eight Gaussians on a ring, and a small GAN that has to find all of them: where collapse is easy to see.

The networks are plain ones, to show that losses, normalisation, averaging, spectra and the alarm ask for no more.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distopt.errors import SettingError
from distopt.optim.averaging import IterateAverage

from .alarm import CollapseAlarm, Warned
from .freezing import frozen
from .losses import discriminator_hinge, generator_hinge, gradient_penalty
from .spectra import top_singular_values_of
from .spectral import held, normalise

MODES = 8
RADIUS = 1.0
DEVIATION = 0.05
_NOISE = 8
_WIDTH = 64
_JUDGED = 2000


@dataclasses.dataclass(frozen=True)
class RingSettings:
    """How the small GAN is trained.

    Args:
        steps: of both networks.
        batch: points a step.
        gamma: the weight of R1; 0 for none.
        spectral: whether the discriminator is spectrally normalised.
        generator_rate: learning rate of the generator.
        discriminator_rate: learning rate of the discriminator.
        averaged: decay of the averaged generator, which is judged.
        every: steps from one reading to the next.
        seed: of everything.
    """

    steps: int = 5000
    batch: int = 128
    gamma: float = 1.0
    spectral: bool = False
    generator_rate: float = 1e-3
    discriminator_rate: float = 1e-3
    averaged: float = 0.99
    every: int = 100
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class RingReading:
    """How things stand after a step.

    Args:
        step: counted from 1.
        modes: of the 8, those covered; see `covered`.
        within: part of the points that lie within three deviations of a mode.
        warned: what the alarm said.
        largest: largest singular value of every weight, by ``generator.`` or ``discriminator.`` and its name.
    """

    step: int
    modes: int
    within: float
    warned: tuple[Warned, ...]
    largest: dict[str, float]


def centres() -> Tensor:
    """The middles of the Gaussians, ``(8, 2)``."""
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angles.cos(), angles.sin()], 1)


def points(count: int, generator: torch.Generator) -> Tensor:
    """Draw from the ring, ``(count, 2)``."""
    chosen = torch.randint(MODES, (count,), generator=generator)
    return centres()[chosen] + DEVIATION * torch.randn(count, 2, generator=generator)


def covered(found: Tensor) -> tuple[int, float]:
    """Count the modes that points cover.

    A mode is covered if a quarter of its share of the points lies within three deviations of its middle.

    Args:
        found: ``(n, 2)``.

    Returns:
        Covered modes, and the part of the points that lie within three deviations of any.

    Example:
        >>> modes, within = covered(points(4000, torch.Generator().manual_seed(0)))
        >>> modes, within > 0.97
        (8, True)
        >>> covered(centres()[:3].repeat(10, 1))
        (3, 1.0)
    """
    near = torch.cdist(found, centres()) <= 3 * DEVIATION
    enough = near.sum(0) >= len(found) / MODES / 4
    return int(enough.sum()), near.any(1).float().mean().item()


def train_ring(
    settings: RingSettings, tell: Callable[[RingReading], None] | None = None
) -> tuple[nn.Module, list[RingReading]]:
    """Train the small GAN.

    Args:
        settings: how.
        tell: takes each reading as soon as there is one.

    Returns:
        The averaged generator, from ``(n, 8)`` noise to ``(n, 2)``, and all readings.

    Raises:
        SettingError: the weight of R1 is negative.
    """
    if not settings.gamma >= 0:
        raise SettingError("RingSettings.gamma", settings.gamma, "a number of at least 0")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(settings.seed)
        generator, discriminator = _network(_NOISE, 2), _network(2, 1)
        if settings.spectral:
            normalise(discriminator)  # whose vectors start at random
    average = IterateAverage(generator, decay=settings.averaged, every=1)
    optimizers = [
        torch.optim.Adam(network.parameters(), rate, betas=(0.0, 0.99))
        for network, rate in ((generator, settings.generator_rate), (discriminator, settings.discriminator_rate))
    ]
    random, alarm, readings = torch.Generator().manual_seed(settings.seed), CollapseAlarm(), []
    for step in range(1, settings.steps + 1):
        _learn_to_tell(discriminator, generator, optimizers[1], settings, random)
        _learn_to_draw(generator, discriminator, optimizers[0], settings.batch, random)
        average.update()
        if step % settings.every == 0 or step == settings.steps:
            readings.append(_reading(step, average.module, (generator, discriminator), alarm))
            if tell is not None:
                tell(readings[-1])
    return average.module, readings


def draw_ring(generator: nn.Module, count: int, seed: int = 1) -> Tensor:
    """Draw ``(count, 2)`` points by a generator of `train_ring`."""
    with torch.no_grad():
        return generator(torch.randn(count, _NOISE, generator=torch.Generator().manual_seed(seed)))


def _network(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(before, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, after)
    )


def _learn_to_tell(
    discriminator: nn.Module,
    generator: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: RingSettings,
    random: torch.Generator,
) -> None:
    real = points(settings.batch, random).requires_grad_(settings.gamma > 0)
    with torch.no_grad():
        fake = generator(torch.randn(settings.batch, _NOISE, generator=random))
    scores = discriminator(torch.cat([real, fake]))
    of_real, of_fake = scores.split(settings.batch)
    loss = discriminator_hinge(of_real, of_fake)
    if settings.gamma > 0:
        loss = loss + gradient_penalty(of_real, real, settings.gamma)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _learn_to_draw(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: int,
    random: torch.Generator,
) -> None:
    optimizer.zero_grad()
    with frozen(discriminator), held(discriminator):
        generator_hinge(discriminator(generator(torch.randn(batch, _NOISE, generator=random)))).backward()
    optimizer.step()


def _reading(
    step: int, averaged: nn.Module, networks: tuple[nn.Module, nn.Module], alarm: CollapseAlarm
) -> RingReading:
    values = {
        f"{whose}.{name}": top
        for whose, network in zip(("generator", "discriminator"), networks, strict=True)
        for name, top in top_singular_values_of(network).items()
    }
    modes, within = covered(draw_ring(averaged, _JUDGED))
    largest = {name: top[0] for name, top in values.items()}
    return RingReading(step, modes, within, tuple(alarm.read(step, values)), largest)
