"""Pictures that people look at: sheets of samples, and plots of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..scenes.draw import to_uint8
from .sampling import Point

_ENLARGED = 3
_GAP = 1


def draw_sheet(path: Path, rows: Sequence[Tensor], enlarged: int = _ENLARGED) -> None:
    """Write a sheet of pictures, each pixel as a square of pixels.

    Args:
        path: of the PNG.
        rows: each ``(n, 3, H, W)`` in [-1, 1], as many in all.
        enlarged: side of a square.
    """
    lines = []
    for row in rows:
        pixels = to_uint8((row + 1) / 2)
        framed = np.pad(pixels, ((0, 0), (_GAP, _GAP), (_GAP, _GAP), (0, 0)), constant_values=255)
        lines.append(np.concatenate(list(framed), axis=1))
    sheet = np.concatenate(lines, axis=0)
    Image.fromarray(sheet.repeat(enlarged, 0).repeat(enlarged, 1)).save(path)


def draw_truncation(path: Path, points: Sequence[Point], contents: int) -> None:
    """Plot fidelity and variety over the threshold, and one over the other.

    Args:
        path: of the PNG.
        points: from no truncation to the smallest threshold.
        contents: different pictures that a class has.
    """
    names = ["none" if point.threshold is None else f"{point.threshold:g}" for point in points]
    accuracy = [point.judgement.accuracy for point in points]
    found = [point.judgement.contents for point in points]
    figure, (left, right) = _figure(2)
    left.plot(names, accuracy, "o-", label="fidelity: class accuracy")
    left.plot(names, [each / contents for each in found], "s-", label=f"variety: contents found of {contents}")
    left.plot(names, [point.judgement.distance for point in points], "^-", label="variety: mean distance")
    left.set(xlabel="threshold of truncation", ylim=(0, 1.05))
    left.legend(fontsize=8)
    right.plot(found, accuracy, "o-")
    for name, x, y in zip(names, found, accuracy, strict=True):
        right.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    right.set(xlabel="different contents a class", ylabel="class accuracy")
    _write(figure, path)


def draw_spectra(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Plot the top three singular values of every weight over a run, one panel a network.

    Args:
        path: of the PNG.
        history: readings with ``step`` and ``spectra``.
    """
    steps = [reading["step"] for reading in history]
    figure, panels = _figure(2, width=6.0)
    for panel, network in zip(panels, ("generator", "discriminator"), strict=True):
        # Norms' gains and biases are many and alike.
        names = [name for name in history[0]["spectra"] if name.startswith(network) and ".norms." not in name]
        for name, colour in zip(names, colormaps["turbo"](np.linspace(0.05, 0.95, len(names))), strict=True):
            values = np.array([reading["spectra"][name] for reading in history])
            values[values == 0] = np.nan  # those that a small matrix does not have
            for rank, style in enumerate(("-", "--", ":")):
                label = name.removeprefix(f"{network}.").removesuffix(".weight") if rank == 0 else None
                panel.plot(steps, values[:, rank], style, color=colour, linewidth=1, label=label)
        panel.set(title=network, xlabel="step", ylabel="singular value, before normalisation")
        panel.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    _write(figure, path)


def draw_ring_points(path: Path, sets: Mapping[str, Tensor], centres: Tensor) -> None:
    """Plot points beside each other, with the middles of the modes.

    Args:
        path: of the PNG.
        sets: ``(n, 2)`` by title.
        centres: ``(m, 2)``.
    """
    figure, panels = _figure(len(sets))
    for panel, (title, points) in zip(np.atleast_1d(panels), sets.items(), strict=True):
        panel.scatter(*points.T.numpy(), s=2, alpha=0.5)
        panel.scatter(*centres.T.numpy(), marker="+", color="black")
        panel.set(title=title, xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
    _write(figure, path)


def rows_by_class(pictures: Tensor, classes: Tensor) -> list[Tensor]:
    """Sort pictures into one row a class."""
    return [pictures[classes == one] for one in torch.unique(classes)]


def _figure(panels: int, width: float = 4.5) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels)


def _write(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
