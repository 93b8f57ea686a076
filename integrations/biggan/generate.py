"""The commands ``sample`` and ``ring``: one process each."""

import dataclasses
from pathlib import Path

import torch

from ..running.ranks import single_thread
from . import drawn, runs
from .ring import MODES, RingReading, RingSettings, centres, draw_ring, points, train_ring
from .sampling import draw_pictures, load_generator, prepare
from .settings import RingOptions
from .sheets import draw_ring_points, draw_sheet, rows_by_class

_SHOWN = 1000


def write_samples(
    folder: Path, out: Path, *, wanted: str | None, count: int, threshold: float | None, seed: int
) -> None:
    """Draw a sheet with a run's averaged generator.

    Args:
        folder: of the run.
        out: the PNG.
        wanted: name of the class; all of them if ``None``.
        count: pictures of each class.
        threshold: of truncation; ``None`` for none.
        seed: of the noise.

    Raises:
        InputError: the folder holds no finished run.
    """
    single_thread()
    generator, settings = load_generator(folder)
    chosen = range(len(drawn.CLASSES)) if wanted is None else [drawn.CLASSES.index(wanted)]
    classes = torch.tensor(list(chosen)).repeat_interleave(count)
    pictures = draw_pictures(prepare(generator, threshold, passes=settings.standing), classes, threshold, seed)
    rows = rows_by_class(pictures, classes) if wanted is None else list(pictures.split(_columns(count)))
    draw_sheet(out, rows if len(rows[-1]) == len(rows[0]) else [*rows[:-1], _filled(rows[-1], len(rows[0]))])


def run_ring(options: RingOptions, out: Path) -> None:
    """Train the small GAN of the ring, and write ``ring.png`` and ``ring.json``.

    Args:
        options: how.
        out: a folder that exists.
    """
    single_thread()
    settings = RingSettings(**dataclasses.asdict(options))
    generator, readings = train_ring(settings, _tell)
    random = torch.Generator().manual_seed(options.seed + 1)
    title = f"drawn after {options.steps} steps: {readings[-1].modes} of {MODES} modes"
    draw_ring_points(out / "ring.png", {"real": points(_SHOWN, random), title: draw_ring(generator, _SHOWN)}, centres())
    history = [{**dataclasses.asdict(each), "warned": [str(warned) for warned in each.warned]} for each in readings]
    runs.write_json(out / "ring.json", {"settings": dataclasses.asdict(options), "history": history})


def _tell(reading: RingReading) -> None:
    print(f"step {reading.step}  modes {reading.modes}/{MODES}  within {reading.within:.2f}", flush=True)
    for warned in reading.warned:
        print(f"collapse may be near: {warned}", flush=True)


def _columns(count: int) -> int:
    """Of a sheet that is about as high as it is wide."""
    return max(1, round(count**0.5))


def _filled(row: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([row, torch.ones(length - len(row), *row.shape[1:])])
