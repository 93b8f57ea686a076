"""Sampling from an averaged generator: settled, with standing statistics, at a threshold of truncation."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..running.fields import InputError
from . import drawn, runs
from .generator import Generator
from .settings import TrainSettings
from .spectral import settle
from .standing import measure_statistics
from .truncation import truncated_normal

THRESHOLDS = (None, 2.0, 1.5, 1.0, 0.7, 0.5, 0.3, 0.15, 0.05)
"""Of the curve of fidelity and variety."""
_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of the curve.

    Args:
        threshold: of truncation; ``None`` for none.
        judgement: of the pictures that were drawn there.
    """

    threshold: float | None
    judgement: drawn.Judgement


def prepare(generator: Generator, threshold: float | None, seed: int = 0, passes: int = 100) -> Generator:
    """Settle the spectral norms of an averaged generator in place, and measure the statistics of the noise it will see.

    Args:
        generator: whose weights were averaged.
        threshold: that it will draw at.
        seed: of the passes.
        passes: of 64 pictures each.

    Returns:
        ``generator``, in eval mode.
    """
    settle(generator)
    random = torch.Generator().manual_seed(seed)
    device = generator.norm.weight.device

    def draw() -> None:
        noise = truncated_normal(_AT_ONCE, generator.sizes.noise, threshold=threshold, generator=random)
        classes = torch.randint(generator.sizes.classes, (_AT_ONCE,), generator=random)
        generator(noise.to(device), classes.to(device))

    return measure_statistics(generator, draw, passes)


@torch.no_grad()
def draw_pictures(generator: Generator, classes: Tensor, threshold: float | None, seed: int = 0) -> Tensor:
    """Draw a picture of each class.

    Args:
        generator: made ready by `prepare`.
        classes: int64 ``(n,)``.
        threshold: of truncation; numbers of noise within it are the same at every threshold.
        seed: of the noise.

    Returns:
        ``(n, 3, size, size)`` in [-1, 1], on the CPU.
    """
    device = generator.norm.weight.device
    random = torch.Generator().manual_seed(seed)
    noise = truncated_normal(len(classes), generator.sizes.noise, threshold=threshold, generator=random)
    parts = zip(noise.split(_AT_ONCE), classes.split(_AT_ONCE), strict=True)
    return torch.cat([generator(part.to(device), wanted.to(device)).cpu() for part, wanted in parts])


def curve(
    generator: Generator, count: int, seed: int = 0, thresholds: Sequence[float | None] = THRESHOLDS, passes: int = 100
) -> list[Point]:
    """Judge drawn pictures at each threshold, with statistics measured there.

    Args:
        generator: of the drawn task; left as it is ready for the last threshold.
        count: pictures at each, a multiple of the classes.
        seed: of the noise.
        thresholds: of truncation.
        passes: of `prepare` at each threshold.
    """
    classes = torch.arange(count) % generator.sizes.classes
    points = []
    for threshold in thresholds:
        pictures = draw_pictures(prepare(generator, threshold, seed + 1, passes), classes, threshold, seed + 2)
        points.append(Point(threshold, drawn.judge(pictures, classes)))
    return points


def load_generator(folder: Path) -> tuple[Generator, TrainSettings]:
    """Load the averaged generator of a finished run.

    Raises:
        InputError: the folder does not hold one.
    """
    if not folder.is_dir():
        raise InputError(f"--run {folder}: there is no such folder")
    settings = runs.read_settings("--run", folder)
    if not (folder / runs.GENERATOR).is_file():
        raise InputError(f"--run {folder}: is not a finished run: it has no {runs.GENERATOR}")
    generator = Generator(settings.sizes())
    try:
        generator.load_state_dict(safetensors.torch.load_file(folder / runs.GENERATOR))
    except (SafetensorError, RuntimeError):
        raise InputError(f"--run {folder}: its {runs.GENERATOR} is damaged, or of other settings") from None
    return generator, settings
