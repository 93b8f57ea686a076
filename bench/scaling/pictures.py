"""The figures: zeros by branch, losses, and scales over a run."""

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from bench.scaling.network import EXIT_AFTER

_INK, _FAINT, _RULE = "#1f2328", "#656d76", "#d0d7de"
_COLOURS = {"float32": "#1f2328", "one scale": "#d73027", "per branch": "#1f78b4", "per branch, paper": "#f39c12"}
_SHOWN = {"float32": "float32", "one scale": "one scale", "per branch": "a scale per branch"}
_DASHES = {"float32": "-", "one scale": "-", "per branch": (0, (4, 2)), "per branch, paper": (0, (1, 1))}


def draw(path: Path, records: Sequence[dict[str, Any]], *, on_purpose: bool) -> None:
    """Draw four panels and write them as PNG.

    Args:
        path: the file to write.
        records: runs; those of the task are taken.
        on_purpose: the task with an early exit of weight 2^28, beside which others are shown; or that without one.
    """
    records = [r for r in records if r["kind"] == "run"]
    hardest = max((r["exit"] for r in records if r["exit"] is not None), default=None)
    mine = [r for r in records if r["exit"] == (hardest if on_purpose else None)]
    # A figure of its own, without pyplot: drawing must not depend on what display there is, or change global state.
    figure = Figure(figsize=(9, 6.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    purpose = f"a spread made on purpose: an early exit after {EXIT_AFTER} branches whose loss weighs $2^{{{hardest}}}$"
    title = "float16, " + (purpose if on_purpose else "the natural case: the same network without the early exit")
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold", color=_INK)
    zeros, octaves, train, validation = figure.subplots(2, 2).flat
    _zeros(zeros, mine, [r for r in records if on_purpose and r["exit"] not in (None, hardest)])
    _octaves(octaves, mine)
    _losses(train, mine, "train", "Training loss", smooth=10)
    _losses(validation, mine, "validation", "Validation loss", smooth=1)
    whole = io.BytesIO()
    figure.savefig(whole)
    Image.open(whole).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def _zeros(axes: Axes, mine: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> None:
    for way, label in _SHOWN.items():
        for number, record in enumerate(r for r in mine if r["way"] == way and r["zeros"]):
            _line(axes, way, range(len(record["zeros"])), _percent(record), label if number == 0 else None)
    others = [r for r in others if r["way"] == "one scale"]
    for place, record in enumerate(others):
        colour = matplotlib.colormaps["Oranges"](0.3 + 0.5 * place / len(others))
        axes.plot(_percent(record), color=colour, linewidth=1.4, label=f"one scale, $2^{{{record['exit']}}}$")
    axes.set_xlabel("branch, from the first to the last", fontsize=8, color=_FAINT)
    largest = max((max(_percent(r), default=0) for r in mine if r["way"] in _SHOWN), default=0)
    axes.set_ylim(*((-3, 103) if largest > 10 else (-0.03, max(1, 1.1 * largest))))
    _finish(axes, "Zeros in weight gradients, %")


def _percent(record: dict[str, Any]) -> list[float]:
    return [100 * share for share in record["zeros"]]


def _losses(axes: Axes, mine: Sequence[dict[str, Any]], figure: str, title: str, smooth: int) -> None:
    for way, label in _SHOWN.items():
        for number, record in enumerate(r for r in mine if r["way"] == way):
            curve = record[figure] if figure == "validation" else list(enumerate(record[figure]))
            steps = [step for step, _ in curve][smooth - 1 :]
            means = [statistics.fmean(y for _, y in curve[i : i + smooth]) for i in range(len(steps))]
            _line(axes, way, steps, means, label if number == 0 else None)
    axes.set_xlabel("step" + (f"; mean of {smooth}" if smooth > 1 else ""), fontsize=8, color=_FAINT)
    _finish(axes, title)


def _octaves(axes: Axes, mine: Sequence[dict[str, Any]]) -> None:
    """Of the first seed."""
    first = min((r["seed"] for r in mine), default=0)
    of = {r["way"]: r["octaves"] for r in mine if r["seed"] == first}
    for place, curve in enumerate(zip(*(o for _, o in of.get("per branch", [])), strict=True)):
        colour = matplotlib.colormaps["viridis"](0.9 * place / max(1, len(of["per branch"][0][1]) - 1))
        axes.plot(curve, color=colour, linewidth=0.9)
    for way, name in (("per branch, paper", "per branch, the paper's rule"), ("one scale", "one scale")):
        for place, curve in enumerate(zip(*(o for _, o in of.get(way, [])), strict=True)):
            label = name if place == 0 else None
            axes.plot(curve, color=_COLOURS[way], linestyle=_DASHES[way], linewidth=1.4, label=label)
    axes.plot([], [], color=matplotlib.colormaps["viridis"](0.45), label="per branch (dark: first, light: last)")
    axes.set_xlabel("step", fontsize=8, color=_FAINT)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.35 * (high - low), high)  # room for the legend
    _finish(axes, "Scales, log2")


def _line(axes: Axes, way: str, x: Sequence[float], y: Sequence[float], label: str | None) -> None:
    axes.plot(x, y, color=_COLOURS[way], linestyle=_DASHES[way], linewidth=1.1, alpha=0.85, label=label)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK)
    axes.grid(color=_RULE, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_FAINT)
    axes.legend(fontsize=8, frameon=False, handlelength=1.6, labelcolor=_INK)
