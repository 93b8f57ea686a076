"""The figure of step times: every way of averaging gradients, over every network."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.lab.figures import Figures, Record
from bench.lab.targets import link_name
from bench.lab.ways import NOOP
from bench.lab.workloads import WORKLOADS

_INK, _FAINT, _RULE = "#1f2328", "#656d76", "#d0d7de"
_COLOURS = ("#1f78b4", "#f39c12", "#d73027", "#542788")
_LAYOUT = "replicated"


def draw(path: Path, records: Sequence[Record]) -> None:
    """Draw a panel a workload and write them as PNG; without records of replicated models nothing is drawn.

    Args:
        path: the file to write.
        records: of `bench.lab`.
    """
    mine = [r for r in records if r["layout"] == _LAYOUT and not r["alone"]]
    workloads = list(dict.fromkeys(r["workload"] for r in mine))
    if not mine:
        return
    # A figure of its own, without pyplot: drawing must not depend on what display there is, or change global state.
    figure = Figure(figsize=(1.6 + 3.6 * len(workloads), 4.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    title = "Milliseconds of a step, by how gradients are averaged (bars: quartiles; ticks: no step could be shorter)"
    figure.suptitle(title, x=0.012, ha="left", fontsize=10, fontweight="bold", color=_INK)
    panels = figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0]
    for axes, workload in zip(panels, workloads, strict=True):
        _panel(axes, [r for r in mine if r["workload"] == workload], Figures(records))
        axes.set_title(WORKLOADS[workload].title, loc="left", fontsize=9, fontweight="bold", color=_INK)
    panels[0].legend(fontsize=8, frameon=False, labelcolor=_INK, loc="lower right")
    figure.savefig(path)


def _panel(axes: Axes, mine: Sequence[Record], figures: Figures) -> None:
    ways = list(dict.fromkeys(r["way"] for r in mine))
    limits = list(dict.fromkeys(r["megabits"] for r in mine))
    for place, megabits in enumerate(limits):
        found = [r for r in mine if r["megabits"] == megabits]
        empty = next((figures.step(r).middle for r in found if r["way"] == NOOP), 0.0)
        rows = [ways.index(r["way"]) + 0.22 * (place - (len(limits) - 1) / 2) for r in found]
        steps = [figures.step(r) for r in found]
        middles = [1e3 * s.middle for s in steps]
        reach = [[1e3 * (s.middle - s.low) for s in steps], [1e3 * (s.high - s.middle) for s in steps]]
        style = {"fmt": "o", "markersize": 4, "elinewidth": 1.4, "color": _COLOURS[place % len(_COLOURS)]}
        axes.errorbar(middles, rows, xerr=reach, label=link_name(megabits), **style)
        # Computing may go on while the wire is busy, so that only the longer of both counts.
        floors = [
            (1e3 * max(empty, floor), row) for r, row in zip(found, rows, strict=True) if (floor := figures.floor(r))
        ]
        if floors:
            axes.plot(*zip(*floors, strict=True), "|", markersize=7, color=style["color"])
    axes.set_yticks(range(len(ways)), ways, fontsize=8)
    axes.set_ylim(len(ways) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color=_RULE, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_FAINT)
