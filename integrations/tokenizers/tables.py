"""Tables and pictures of a sweep: JSON for programs, Markdown for pages, PNG to look at."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import runs
from .data import source_of

STAGE_2 = ("s0", "s1", "s2")
"""Scores of a stage 2 on the tokens, which another command fills in: shares of right samples, by split."""
_COLUMNS = {
    "name": ("bottleneck", "{}"),
    "codes": ("K", "{}"),
    "used": ("used", "{:.0%}"),
    "perplexity": ("perplexity", "{:.0f}"),
    "quantisation_error": ("quantisation error", "{:.3f}"),
    "mse": ("MSE", "{:.5f}"),
    "psnr": ("PSNR, dB", "{:.2f}"),
    "exact": ("exact scenes", "{:.1%}"),
    **{split: (split.upper(), "{:.0%}") for split in STAGE_2},
}
_COLOURS = {"vq": "#b5483a", "ema": "#c9982f", "ema-unreplaced": "#8a8a8a", "simvq": "#1f5a96"}
_SHOWN = 10


def write(out: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write ``table.json`` and ``table.md``; gives the latter."""
    (out / "table.json").write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")
    table = markdown(rows)
    (out / "table.md").write_text(table, encoding="utf-8")
    return table


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with a column for everything that some row has.

    Example:
        >>> print(markdown([{"name": "vq", "codes": 64, "mse": 0.01}, {"name": "fsq", "codes": 64, "used": 1.0}]))
        | bottleneck | K | used | MSE |
        |---|---|---|---|
        | vq | 64 |  | 0.01000 |
        | fsq | 64 | 100% |  |
        <BLANKLINE>
    """
    kept = {key: column for key, column in _COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    lines = [
        " | ".join(title for title, _ in kept.values()),
        "|".join("---" for _ in kept),
        *(" | ".join(_cell(row.get(key), form) for key, (_, form) in kept.items()) for row in rows),
    ]
    return "".join(f"|{line}|\n" if set(line) <= {"-", "|"} else f"| {line} |\n" for line in lines)


def draw_curve(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw usage, perplexity and reconstruction over K; rows whose names differ in the size alone make a line."""
    figure = _figure(11, 3.4)
    panels = {"used": "Share of codes in use", "perplexity": "Perplexity", "psnr": "PSNR of held-out pictures, dB"}
    for axes, (key, title) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        for line in dict.fromkeys(_line(row) for row in rows):
            points = [(row["codes"], row[key]) for row in rows if _line(row) == line]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=line, color=_COLOURS.get(line))
        _dress(axes, title, sorted({row["codes"] for row in rows}))
        if key == "perplexity":
            axes.set_yscale("log", base=2)
        if key == "used":
            axes.set_ylim(0, 1.05)
            axes.legend(frameon=False)
    figure.savefig(path)


def draw_pictures(path: Path, out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw some pictures, and below them what each row's autoencoder brings back.

    Args:
        path: the file to write.
        out: folder with a run's folder by each row's name.
        rows: of a table.
    """
    pictures = source_of(str(rows[0]["data"])).judged(_SHOWN, np.random.default_rng(3))
    figure = _figure(_SHOWN, len(rows) + 1)
    grid = figure.subplots(len(rows) + 1, _SHOWN, squeeze=False)
    shown = {"original": pictures}
    with torch.no_grad():
        shown |= {str(row["name"]): runs.load(out / str(row["name"]))(pictures)[0] for row in rows}
    for line, (name, each) in zip(grid, shown.items(), strict=True):
        for axes, picture in zip(line, each.clamp(0, 1), strict=True):
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path)


def _figure(width: float, height: float) -> Figure:
    # A figure of its own, without pyplot: drawing must not depend on what display there is.
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _line(row: Mapping[str, Any]) -> str:
    return str(row["name"]).rpartition("-")[0]


def _dress(axes: Axes, title: str, sizes: Sequence[int]) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    axes.set_xlabel("codes K")
    axes.grid(color="#dddddd", linewidth=0.5)


def _cell(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)
