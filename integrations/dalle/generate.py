"""Draws pictures for a caption with a finished run."""

import dataclasses
import math
from pathlib import Path

import torch

from ..running.ranks import single_thread
from ..scenes.draw import to_tensor
from . import sheets
from .drawing import Request, Top
from .model import Model
from .runs import Run

_COLUMNS = 8


def write_samples(run: Run, request: Request, out: Path, *, device: str) -> None:
    """Write samples for a caption as PNG: one picture alone, or a sheet of several.

    Args:
        run: a finished run.
        request: what to draw, and how.
        out: the file; its folder must exist.
        device: where to compute.

    Raises:
        InputError: the run's files are damaged.
    """
    single_thread()
    model = Model.load(run, torch.device(device))
    model = dataclasses.replace(model, sampling=dataclasses.replace(model.sampling, **request.sampling))
    codes = None if request.top is None else top_codes(model, request.top)
    if request.best_of > 1:
        pictures = model.draw_best(request.caption, request.seed, codes, n=request.n, of=request.best_of)
    else:
        pictures = model.draw([request.caption] * request.n, request.seed, codes)
    if request.n == 1:
        sheets.draw_picture(out, pictures[0])
        return
    note = f"{request.n} samples, seed {request.seed}"
    if request.best_of > 1:
        note = f"the best {request.n} of {request.n * request.best_of} samples, the best one first, seed {request.seed}"
    if request.top is not None:
        note += f", the upper {request.top.rows} of {model.transformer.settings.grid} rows of tokens given"
    section = sheets.Section(request.caption, note, [sheets.Cell([picture]) for picture in pictures])
    # Rows of equal length where that is possible: ten samples make two rows of five.
    rows = math.ceil(request.n / _COLUMNS)
    sheets.draw_sheet(out, [section], columns=math.ceil(request.n / rows))


@torch.no_grad()
def top_codes(model: Model, top: Top) -> torch.Tensor:
    """Tokenise the top of a picture.

    Returns:
        int64 ``(rows * g,)`` on the model's device.
    """
    codes = model.dvae.tokenize(to_tensor(top.picture[None].copy()).to(model.transformer.start.device))
    return codes[0, : top.rows * model.transformer.settings.grid]
