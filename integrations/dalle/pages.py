"""The sheets of pictures that a run or its evaluation leaves: samples, choices, reconstructions, held-out captions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..scenes.draw import to_uint8
from . import sheets
from .context import Judged
from .metrics import ssim
from .model import Model
from .rerank import Chosen

_TITLES = {
    "s0": "S0 · seen captions, drawn anew",
    "s1": "S1 · unseen combinations",
    "s2": "S2 · colour-shape pairs never captioned",
}
_COLUMNS = 8
"""Samples of each split on the sheet: one row."""
_CHOICES = 4
"""Captions of each split on the sheet of choices."""
_PAIRS = 6
_ROWS = 5
_NOTHING = "nothing is selected or corrected."
_FOOTER = f"The first captions of each split, one free sample each; {_NOTHING}"
_CHOSEN = (
    "The first captions of each split; the frame is around the chosen candidate, green if it is right, red if not."
)


def draw_samples(path: Path, figures: Mapping[str, Any], samples: Mapping[str, Any]) -> None:
    """Write a row of samples for each split of the drawn task.

    Args:
        path: the file.
        figures: scores by split.
        samples: by split, ``captions`` with their verdicts and ``pictures``.
    """
    sections = []
    for split, graded in samples.items():
        score = figures[split]
        interval = f"95 % interval {score['low']:.1%} to {score['high']:.1%}, n = {score['n']}"
        cells = [
            sheets.Cell([picture], caption, right)
            for (caption, right), picture in zip(graded.captions, graded.pictures, strict=True)
        ]
        sections.append(sheets.Section(_TITLES[split], f"{score['exact']:.1%} exact, {interval}", cells))
    sheets.draw_sheet(path, sections, columns=_COLUMNS, footer=_FOOTER)


def draw_choices(path: Path, figures: Mapping[str, Any], chosen: Mapping[str, Chosen]) -> None:
    """Write a row of candidates for some captions of each split, the chosen one framed.

    Args:
        path: the file.
        figures: ``best_of`` of the report.
        chosen: candidates by split.
    """
    sections = []
    for split, found in chosen.items():
        score = figures[split]
        cells = []
        for caption, right, best, pictures in zip(
            found.captions[:_CHOICES], found.right, found.best, found.pictures, strict=False
        ):
            for i, picture in enumerate(pictures):
                cells.append(sheets.Cell([picture], caption if i == 0 else "", bool(right[i]) if i == best else None))
        note = (
            f"{score['picked']['exact']:.1%} of the chosen are right, {score['ceiling']['exact']:.1%} have a right one"
        )
        sections.append(sheets.Section(_TITLES[split], f"{note}, n = {score['picked']['n']}", cells))
    candidates = max(found.pictures.shape[1] for found in chosen.values())
    sheets.draw_sheet(path, sections, columns=candidates, footer=_CHOSEN)


@torch.no_grad()
def draw_reconstructions(path: Path, model: Model, pictures: Tensor) -> None:
    """Write pictures beside what their argmax tokens decode to: the first ones, and those that come back worst.

    Args:
        path: the file.
        model: gives the tokenizer.
        pictures: ``(n, 3, S, S)`` in [0, 1].
    """
    device = model.transformer.start.device
    decoded = torch.cat([model.dvae.decode(model.dvae.tokenize(part.to(device))).cpu() for part in pictures.split(256)])
    likeness = ssim(pictures, decoded)
    tokens = model.transformer.settings.image_length
    note = f"left a picture, right what its {tokens} tokens decode to"
    shown, back = to_uint8(pictures), to_uint8(decoded)
    order = {f"Reconstructions, mean SSIM {likeness.mean():.3f}": np.arange(len(shown))}
    order[f"The worst of {len(shown)}"] = likeness.argsort().numpy()
    sections = []
    for title, places in order.items():
        cells = [sheets.Cell((shown[i], back[i]), f"SSIM {likeness[i]:.3f}") for i in places[: _PAIRS * _ROWS]]
        sections.append(sheets.Section(title, note, cells))
    sheets.draw_sheet(path, sections, columns=_PAIRS)


def draw_held_out(path: Path, model: Model, judged: Judged, seed: int) -> None:
    """Write pictures beside a sample for their captions, as many as fit, different captions first.

    Args:
        path: the file.
        model: draws.
        judged: held-out captions and pictures, where there are any.
        seed: decides the samples.
    """
    captions, pictures = judged.captions, judged.pictures
    # Different captions first: folders often say the same of many pictures.
    first_of = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    order = sorted(range(len(captions)), key=lambda i: (first_of[captions[i]] != i, i))[:24]
    drawn = model.draw([captions[i] for i in order], seed)
    real = to_uint8(pictures[order])
    cells = [sheets.Cell([truth, sample], captions[i]) for i, truth, sample in zip(order, real, drawn, strict=True)]
    title = "Held-out captions" if judged.unseen else "Training captions"
    section = sheets.Section(title, "left the real picture, right what the model drew", cells)
    sheets.draw_sheet(path, [section], columns=_PAIRS, footer=f"{title} with one free sample each; {_NOTHING}")
