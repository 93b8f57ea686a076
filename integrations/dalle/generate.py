"""Draws pictures for a caption with a finished run."""

import math
from pathlib import Path

import torch

from . import sheets
from .model import Model
from .ranks import single_thread
from .runs import Run

_COLUMNS = 8


def write_samples(run: Run, caption: str, out: Path, *, n: int, seed: int, device: str) -> None:
    """Write ``n`` samples for a caption as PNG: one picture alone, or a sheet of several.

    Args:
        run: a finished run.
        caption: what to draw.
        out: the file; its folder must exist.
        n: how many samples.
        seed: decides the samples.
        device: where to compute.

    Raises:
        InputError: the run's files are damaged.
    """
    single_thread()
    pictures = Model.load(run, torch.device(device)).draw([caption] * n, seed)
    if n == 1:
        sheets.draw_picture(out, pictures[0])
        return
    section = sheets.Section(caption, f"{n} samples, seed {seed}", [sheets.Cell([picture]) for picture in pictures])
    # Rows of equal length where that is possible: ten samples make two rows of five.
    rows = math.ceil(n / _COLUMNS)
    sheets.draw_sheet(out, [section], columns=math.ceil(n / rows))
