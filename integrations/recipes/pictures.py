"""Pictures of the runs, by matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .pooling import NoisyAnd


def draw_log_variances(path: Path, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Draw the log-variances of each task over the steps.

    Args:
        path: of the PNG file.
        curves: one value a task and step, by way.
    """
    figure, axes = _axes(max(1, len(curves)), shared=True)
    for axis, (way, curve) in zip(axes, curves.items(), strict=False):
        for task in curve[0] if curve else ():
            axis.plot(range(1, len(curve) + 1), [values[task] for values in curve], label=task)
        axis.set(title=way, xlabel="step")
        axis.legend(frameon=False)
    axes[0].set_ylabel("s = ln(variance)")
    figure.savefig(path)


def draw_values(path: Path, values: Mapping[str, Sequence[float]], meaning: str) -> None:
    """Draw a dot for each seed and a bar for their mean, a row a way.

    Args:
        path: of the PNG file.
        values: one a seed, by way.
        meaning: what they are.
    """
    figure, (axis,) = _axes(1)
    names = list(values)[::-1]
    for row, name in enumerate(names):
        axis.plot(values[name], [row] * len(values[name]), "o", color="C0", alpha=0.5)
        axis.plot([np.mean(values[name])] * 2, [row - 0.3, row + 0.3], color="C3", linewidth=2)
    axis.axvline(0, color="0.7", linewidth=1, zorder=0)
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel=meaning)
    figure.savefig(path)


def draw_thresholds(
    path: Path, fractions: Sequence[float], thresholds: Mapping[float, Sequence[Sequence[float]]]
) -> None:
    """Draw Noisy-AND's curves, and the learned thresholds over the planted fractions.

    Args:
        path: of the PNG file.
        fractions: planted, one a class.
        thresholds: learned, one list a seed, by slope; the curves are those of the steepest.
    """
    figure, (left, right) = _axes(2)
    means = torch.linspace(0, 1, 201)[:, None]
    slope = max(thresholds)
    found = np.mean(thresholds[slope], axis=0)
    for index, fraction in enumerate(fractions):
        with torch.no_grad():
            curve = NoisyAnd(1, slope=slope, start=float(np.clip(found[index], 0, 1))).curve(means)
        left.plot(means.flatten(), curve.flatten(), color=f"C{index}", label=f"digit {index}")
        left.axvline(fraction, color=f"C{index}", linestyle=":", linewidth=1)
        for each, marker in zip(sorted(thresholds), "x+s^", strict=False):
            values = [seed[index] for seed in thresholds[each]]
            name = f"a = {each:g}" if index == 0 else None
            right.plot([fraction] * len(values), values, marker, color=f"C{index}", alpha=0.8, label=name)
    left.set(title=f"Noisy-AND, a = {slope:g}; dotted: planted", xlabel="mean of the instances", ylabel="P of the bag")
    left.legend(frameon=False)
    right.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=0)
    right.set(
        title="thresholds, a mark a seed", xlabel="planted fraction", ylabel="learned b", xlim=(0, 1), ylim=(0, 1)
    )
    right.legend(frameon=False)
    figure.savefig(path)


def _axes(number: int, shared: bool = False) -> tuple[Any, list[Any]]:
    # A figure of its own, not pyplot's: nothing stays open, and no display is asked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * number + (2.5 if number == 1 else 0), 3.4), dpi=120, layout="constrained")
    return figure, list(figure.subplots(1, number, squeeze=False, sharey=shared)[0])
