"""Plots as SVG: small, without a font or a colour of their own, so that a page shows them light and dark."""

import functools
import html
import importlib
import io
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distopt.errors import MissingPackageError
from distopt.monitor.records import Curve, finite
from distopt.monitor.sections import TOLD_APART, Look, Panel
from distopt.monitor.style import COLOURS

_INK, _GRID = "#010203", "#010204"
_PLACEHOLDERS = {f"#0102{10 + i}": f"var(--{name})" for i, name in enumerate(COLOURS)}
_POINTS = 300
"""Of a drawn curve; a longer one is drawn by the lowest and the highest of neighbours."""
_OUTERMOST = 4
_SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-4, 5),
    "grid.color": _GRID,
    "grid.linewidth": 0.5,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.4,
    "path.simplify": True,
    "path.simplify_threshold": 0.2,
}
_Points = list[tuple[int, float]]


def draw(panel: Panel, number: int) -> tuple[str, dict[str, str]]:
    """Draw one panel.

    Args:
        panel: what is drawn.
        number: of the panel on its page, from which ids are made.

    Returns:
        An ``<svg>`` element, and the legend: the colour of each curve that has one of its own, by its name. Of more
        curves than can be told apart there are the range, the median, and the outermost by name.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        matplotlib, figures, tickers = map(
            importlib.import_module, ("matplotlib", "matplotlib.figure", "matplotlib.ticker")
        )
    except ImportError:
        raise MissingPackageError("matplotlib", "report") from None
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_SETTINGS, "svg.hashsalt": str(number)}):
        figure = figures.Figure(figsize=(4.9, 2.7), layout="constrained")
        axes: Any = figure.add_subplot()
        legend = _draw_curves(axes, panel)
        axes.set_xlabel("step", labelpad=2)
        axes.xaxis.set_major_locator(tickers.MaxNLocator(nbins=6, integer=True))
        _limit(axes, panel, tickers)
        stream = io.StringIO()
        figure.savefig(
            stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _inline(stream.getvalue(), panel.title), legend


def _draw_curves(axes: Any, panel: Panel) -> dict[str, str]:
    lines = {name: finite(curve) for name, curve in panel.curves.items()}
    shown: Mapping[str, _Points] = lines
    legend: dict[str, str] = {}
    if len(lines) > TOLD_APART:
        legend |= _draw_range(axes, lines.values(), panel)
        shown = dict(_outermost(lines, panel))
    free = [name for name in _PLACEHOLDERS if _PLACEHOLDERS[name] not in legend.values()]
    for (name, points), colour in zip(shown.items(), itertools.cycle(free), strict=False):
        _draw_curve(axes, points, colour, panel)
        legend[name] = _PLACEHOLDERS[colour]
        _mark(axes, panel.curves[name], colour)
    return legend


def _draw_curve(axes: Any, points: _Points, colour: str, panel: Panel) -> None:
    style = {"drawstyle": "steps-post"} if panel.look.stairs else {}
    if len(points) == 1:
        style["marker"] = "o"
    smoothed = panel.look.smooth and len(points) > 40
    axes.plot(
        *_columns(_thinned(points)), color=colour, **style, **({"alpha": 0.3, "linewidth": 0.8} if smoothed else {})
    )
    if smoothed:
        axes.plot(*_columns(_thinned(_running_mean(points))), color=colour)


def _draw_range(axes: Any, lines: Iterable[_Points], panel: Panel) -> dict[str, str]:
    """What lies between the lowest and the highest of many curves, and their median."""
    at: dict[int, list[float]] = {}
    for points in lines:
        for step, value in points:
            at.setdefault(step, []).append(value)
    steps = sorted(at)[:: max(1, len(at) // _POINTS)]
    colour = next(iter(_PLACEHOLDERS))
    where = {"step": "post"} if panel.look.stairs else {}
    axes.fill_between(
        steps, [min(at[s]) for s in steps], [max(at[s]) for s in steps], color=colour, alpha=0.18, linewidth=0, **where
    )
    medians = [(step, statistics.median(at[step])) for step in steps]
    axes.plot(*_columns(medians), color=colour, drawstyle="steps-post" if panel.look.stairs else "default")
    return {"median, and range of all": _PLACEHOLDERS[colour]}


def _outermost(lines: Mapping[str, _Points], panel: Panel) -> list[tuple[str, _Points]]:
    """The curves that are worst at their ends."""
    ended = [(name, points) for name, points in lines.items() if points]
    return sorted(ended, key=lambda each: each[1][-1][1], reverse=not panel.look.lowest)[:_OUTERMOST]


def _mark(axes: Any, curve: Curve, colour: str) -> None:
    """Crosses on the lower edge where a value is NaN or infinite."""
    steps = [step for step, value in zip(curve.steps, curve.values, strict=True) if not math.isfinite(value)]
    if steps:
        axes.plot(
            steps[:: 1 + len(steps) // 100], [0.02] * len(steps[:: 1 + len(steps) // 100]),
            "x", color=colour, markersize=4, transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _limit(axes: Any, panel: Panel, tickers: Any) -> None:
    values = [value for curve in panel.curves.values() for _, value in finite(curve)]
    if panel.look.logarithmic and values and min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
        few = max(values) < 200 * min(values)
        axes.yaxis.set_major_locator(tickers.LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_minor_locator(tickers.NullLocator())
    elif panel.look.percent:
        axes.set_ylim(min(0.0, *values) if values else 0.0, 1.0)
    elif panel.look.axis == "skipped steps":
        axes.set_ylim(0, max(1.0, *(1.05 * value for value in values)) if values else 1.0)
    elif panel.look.axis in ("seconds", "bytes a step"):
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(tickers.FuncFormatter(functools.partial(_tick, panel.look)))


def _tick(look: Look, value: float, position: int | None) -> str:
    return written(value, look)


def written(value: float, look: Look) -> str:
    """Write a value as its plot does.

    Example:
        >>> written(0.925, Look("not sent", percent=True)), written(3.2e6, Look("bytes a step")), written(1e-9, Look())
        ('92.5 %', '3.2 MB', '1e-09')
    """
    if look.percent and math.isfinite(value):
        return f"{round(100 * value, 1):g} %"
    if look.axis.startswith("bytes") and math.isfinite(value):
        power = max(0, min(4, int(math.log10(abs(value) or 1) // 3)))
        return f"{value / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
    return f"{value:.4g}"


def _columns(points: _Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _running_mean(points: _Points) -> _Points:
    """Mean of the points around each, a fortieth of all."""
    half = max(1, len(points) // 80)
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    ends = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    return [(step, (sums[b] - sums[a]) / (b - a)) for (step, _), (a, b) in zip(points, ends, strict=True)]


def _thinned(points: _Points) -> _Points:
    """Few enough points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= _POINTS:
        return points
    size = math.ceil(len(points) / (_POINTS // 2))
    stretches: Sequence[_Points] = [points[first : first + size] for first in range(0, len(points), size)]
    ends = [{min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])} for s in stretches]
    return [points[0], *(point for pair in ends for point in sorted(pair)), points[-1]]


def _inline(text: str, title: str) -> str:
    """The element alone, in the colours and the font of the page around it."""
    svg = text[text.index("<svg") :]
    svg = re.sub(
        r'(<svg[^>]*?) height="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1), count=1
    )
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    # Of coordinates two decimals are enough; the numbers at the axes are text, and stay.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), svg)
    for colour, name in {_INK: "var(--ink)", _GRID: "var(--grid)", **_PLACEHOLDERS}.items():
        svg = svg.replace(colour, name)
    return re.sub(r">\s+<", "><", svg).replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1).strip()
