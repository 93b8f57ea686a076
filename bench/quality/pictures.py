"""The figure of quality: what compression adds to the loss at equal steps, and the loss against time."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from bench.lab.targets import link_name
from bench.quality.figures import Group, Record, Times, groups
from bench.quality.tables import TARGET, TITLES, widest
from bench.quality.ways import Way

_INK, _FAINT, _RULE, _MET = "#1f2328", "#656d76", "#d0d7de", "#e6f4ea"
_PRECISIONS = {"fp32": "#1f78b4", "bf16": "#f39c12"}
_SHOWN = {
    Way(): _INK,
    Way(1): "#d73027",
    Way(4): "#1f78b4",
    Way(4, late=True): "#f39c12",
    Way(32): "#1b9e77",
}
"""Ways whose losses are drawn against time, and their colours."""


def draw(path: Path, records: Sequence[Record]) -> None:
    """Draw a row of panels a task and write them as PNG; nothing without runs.

    Args:
        path: the file to write.
        records: of `bench.quality`.
    """
    found, times = groups(records), Times(records)
    main = widest(found)
    if not main:
        return
    limits = list(dict.fromkeys(limit for group in main for limit in times.limits(group.task)))
    # A figure of its own, without pyplot: drawing must not depend on what display there is, or change global state.
    columns = 1 + max(1, len(limits))
    figure = Figure(figsize=(1.2 + 3.1 * columns, 0.6 + 3.2 * len(main)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    title = "Held-out loss at equal steps; training loss " + ("against time (float32)" if limits else "(float32)")
    figure.suptitle(title, x=0.012, ha="left", fontsize=10.5, fontweight="bold", color=_INK)
    for row, group in zip(figure.subplots(len(main), columns, squeeze=False), main, strict=True):
        _differences(row[0], [g for g in found if (g.task, g.steps) == (group.task, group.steps)])
        if not limits:
            _curves(row[1], group, None, "by steps")
        for axes, limit in zip(row[1:], limits, strict=False):
            _curves(axes, group, (times, limit), link_name(limit))
        low = min(axes.get_ylim()[0] for axes in row[1:])
        for axes in row[1:]:
            axes.set_ylim(low, row[1].get_ylim()[1])
        if row[1].get_legend_handles_labels()[0]:
            row[1].legend(fontsize=7.5, frameon=False, labelcolor=_INK, loc="upper right")
    whole = io.BytesIO()
    figure.savefig(whole)
    Image.open(whole).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def _differences(axes: Axes, found: Sequence[Group]) -> None:
    """A dot a seed, a line at their mean; a row a way, the exact one left out."""
    ways = [way for way in dict.fromkeys(way for group in found for way in group.ways) if way.rank]
    axes.axvspan(-100, 100 * TARGET, color=_MET, linewidth=0, zorder=0)
    axes.axvline(0, color=_FAINT, linewidth=0.8, zorder=1)
    largest = 100 * TARGET
    for place, group in enumerate(found):
        colour, shift = _PRECISIONS[group.precision], 0.26 * (place - (len(found) - 1) / 2)
        for row, way in enumerate(ways):
            away = [100 * value for value in group.away(way).values()]
            label = group.precision if row == 0 else None
            axes.plot(away, [row + shift] * len(away), "o", markersize=4, alpha=0.75, color=colour, label=label)
            largest = max([largest, *away])
    axes.set_xlim(-0.06 * largest - 100 * TARGET, 1.06 * largest)
    axes.set_yticks(range(len(ways)), [way.label for way in ways], fontsize=8)
    axes.set_ylim(len(ways) - 0.5, -0.5)
    axes.set_xlabel(f"% above AllReduce (shaded: up to {100 * TARGET:g} %)", fontsize=8, color=_FAINT)
    axes.legend(fontsize=7.5, edgecolor=_RULE, fancybox=False, framealpha=1, labelcolor=_INK, loc="center right")
    group = found[0]
    _finish(axes, f"{TITLES[group.task]}, {group.steps:,} steps")


def _curves(axes: Axes, group: Group, network: tuple[Times, int | None] | None, title: str) -> None:
    """Mean over the seeds, smoothed; against steps where there is no network."""
    tops: list[float] = []
    for way, colour in _SHOWN.items():
        clock = network and network[0].clock(group, way, network[1])
        if way not in group.ways or (network and clock is None):
            continue
        curve = [(step, loss) for step, loss in enumerate(group.curve(way), 1) if loss is not None]
        x = [clock.seconds(step) if clock else step for step, _ in curve]
        y = [loss for _, loss in curve]
        tops.append(y[len(y) // 8])
        axes.plot(x, y, color=colour, linewidth=1.3, label=way.label)
        axes.plot(x[-1], y[-1], "o", markersize=4, color=colour)
    if tops:
        axes.set_ylim(None, max(tops))
    axes.set_xlim(0, None)
    axes.set_xlabel("seconds" if network else "steps", fontsize=8, color=_FAINT)
    _finish(axes, title)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold", color=_INK)
    axes.grid(color=_RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_FAINT)
