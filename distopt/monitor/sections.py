"""Which curves of a run belong together: by their tags, those that distopt writes and those that are common."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from distopt.monitor.records import Curve

TOLD_APART = 6
"""Curves of one plot that can still be told apart."""
_PAUSE = 20
"""Times the usual step: what takes longer is no step, but an evaluation or a restart."""
_OF = r"(?:(?P<of>.*)/)?"


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot.

    Args:
        source: where the curves come from: a folder, or what their tags begin with.
        title: of what.
        curves: by what the legend calls them.
        look: how they are drawn.
    """

    source: str
    title: str
    curves: Mapping[str, Curve]
    look: "Look"


@dataclasses.dataclass(frozen=True)
class Look:
    """How curves of a kind are drawn.

    Args:
        axis: what the vertical axis counts; empty where the title says it.
        percent: whether values are fractions, drawn as percentages from 0 to 100.
        logarithmic: whether the vertical axis is logarithmic, where all values are above 0.
        smooth: whether a running mean is drawn over the points.
        stairs: whether a value holds until the next point.
        lowest: whether the lowest curves, and not the highest, are those to look at where there are many.
        together: how many curves go into one plot; 0 for any number, shown as their range and the outermost.
    """

    axis: str = ""
    percent: bool = False
    logarithmic: bool = False
    smooth: bool = False
    stairs: bool = False
    lowest: bool = False
    together: int = 0


@dataclasses.dataclass(frozen=True)
class Section:
    """Plots under one heading.

    Args:
        title: the heading.
        meaning: what is seen there, in a line or two.
        panels: the plots.
        folded: whether it is shown only when asked for.
    """

    title: str
    meaning: str
    panels: Sequence[Panel]
    folded: bool = False


_MEANINGS = {
    "Saving": "Fraction of the gradients' bytes that was not sent, so far: of all gradients, and of those compressed "
    "alone. Plain DDP is at 0.",
    "Errors of the compression": "What this rank kept back in a measured step: its norm over that of gradient plus "
    "residual (reconstruction error), and over that of the gradient alone (residual ratio). All layers taken as one "
    "vector, and each by itself: a layer far above the others wants a larger rank.",
    "Gradient scales": "What a loss, or the gradients of a branch, are multiplied by. One that keeps falling tells of "
    "gradients that overflow.",
    "Losses": "Every point that was written, and a running mean.",
    "Steps": "How long a step takes, and how many were skipped so far because something was not finite.",
    "Everything else": "All other scalars in the event files.",
}
_RULES = (
    ("Saving", _OF + r"(?P<name>(?:matrix_)?saving)", Look("not sent", percent=True)),
    ("Saving", _OF + r"(?P<name>bytes_(?:sent|uncompressed)_per_step)", Look("bytes a step")),
    (
        "Errors of the compression",
        _OF + r"(?P<name>(?:worst_)?reconstruction_error)",
        Look("reconstruction error", logarithmic=True),
    ),
    (
        "Errors of the compression",
        _OF + r"(?P<name>(?:worst_)?residual_ratio)",
        Look("residual ratio", logarithmic=True),
    ),
    (
        "Errors of the compression",
        r"(?:(?P<of>.*)\.)?(?P<figure>reconstruction_error|residual_ratio)/(?P<name>.+)",
        Look("by layer", logarithmic=True),
    ),
    (
        "Everything else",
        r"(?:(?P<of>.*)\.)?(?P<figure>bytes_sent)/(?P<name>.+)",
        Look("bytes of a layer", logarithmic=True),
    ),
    (
        "Gradient scales",
        r"(?:(?P<of>.*)[./])?(?P<figure>log2[ _]scale|scale_log2)/(?P<name>.+)",
        Look("log2 of the scale", stairs=True, lowest=True),
    ),
    (
        "Gradient scales",
        _OF + r"(?P<name>(?i:(?:loss|grad|gradient|amp)[_ ]?)?scale)",
        Look("scale", stairs=True, logarithmic=True),
    ),
    ("Steps", _OF + r"(?P<name>(?i:[^/]*(?:seconds|step_?time)[^/]*))", Look("seconds", smooth=True)),
    ("Steps", r"(?:(?P<of>.*?)/)?(?P<name>(?i:[^/]*skip.*))", Look("skipped steps", stairs=True)),
    ("Losses", r"(?=.*(?i:loss|nll))" + _OF + r"(?P<name>.*)", Look("loss", smooth=True, together=6)),
    ("Everything else", _OF + r"(?P<name>.*)", Look(together=1)),
)


def sort_curves(curves: Iterable[Curve]) -> list[Section]:
    """Put every curve into one section; those without curves are left out.

    Example:
        >>> loss, saving = (Curve(".", tag, (0,), (0.5,), (0.0,)) for tag in ("train/loss", "distopt/saving"))
        >>> [(section.title, [panel.title for panel in section.panels]) for section in sort_curves([loss, saving])]
        [('Saving', ['not sent']), ('Losses', ['train · loss'])]
    """
    curves = list(curves)
    groups: dict[tuple[int, str, str], dict[str, Curve]] = {}
    for curve in curves:
        number, source, figure, name = _place(curve)
        groups.setdefault((number, source, figure), {})[name] = curve
    panels: dict[str, list[Panel]] = {title: [] for title in _MEANINGS}
    for (number, source, figure), named in sorted(groups.items()):
        title, _, look = _RULES[number]
        panels[title].extend(_panels(source, figure, named, look))
    if not any(panel.look.axis == "seconds" for panel in panels["Steps"]):
        panels["Steps"][:0] = _reckoned(curves)
    return [
        Section(title, _MEANINGS[title], of_title, folded=title == "Everything else")
        for title, of_title in panels.items()
        if of_title
    ]


def _place(curve: Curve) -> tuple[int, str, str, str]:
    """The number of the first rule that fits, the source, the figure if there is one, and the name."""
    folder = "" if curve.folder in (".", "tensorboard") else curve.folder
    for number, (_, pattern, _) in enumerate(_RULES):
        if found := re.fullmatch(pattern, curve.tag, re.DOTALL):
            parts = found.groupdict()
            # What is written under the usual prefix belongs to the curves beside it.
            of = re.sub(r"(^|/)distopt$", "", parts["of"] or "")
            source = ": ".join(part for part in (folder, of) if part)
            return number, source, parts.get("figure") or "", parts["name"]
    raise AssertionError("the last rule fits everything")


def _panels(source: str, figure: str, named: Mapping[str, Curve], look: Look) -> Iterator[Panel]:
    items = list(named.items())
    size = look.together or len(items)
    for first in range(0, len(items), size):
        some = dict(items[first : first + size])
        subject = look.axis or next(iter(some))
        if look.axis == "by layer":
            subject = f"{figure.replace('_', ' ')} by layer"
        yield Panel(source, " · ".join(part for part in (source, subject) if part), some, look)


def _reckoned(curves: Sequence[Curve]) -> list[Panel]:
    """Seconds a step from the times at which points were written: of the densest curves that do not overlap in time."""
    found: list[tuple[Curve, Panel]] = []
    for curve in sorted(curves, key=lambda curve: len(curve.steps), reverse=True):
        began, ended = min(curve.times), max(curve.times)
        apart = all(ended <= min(other.times) or max(other.times) <= began for other, _ in found)
        seconds = _seconds(curve)
        if apart and len(seconds.steps) > 1:
            source = _place(curve)[1]
            title = " · ".join(part for part in (source, "seconds a step") if part)
            found.append((curve, Panel(source, title, {"seconds a step": seconds}, Look("seconds", smooth=True))))
    return [panel for _, panel in sorted(found, key=lambda each: each[0].times[0])]


def _seconds(curve: Curve) -> Curve:
    """Seconds a step between the points of a curve, without pauses."""
    points = sorted(zip(curve.times, curve.steps, strict=True))
    found = [
        (step, (time - earlier) / (step - before), time)
        for (earlier, before), (time, step) in itertools.pairwise(points)
        if step > before and time > earlier
    ]
    usual = sorted(value for _, value, _ in found)[len(found) // 2] if found else 0.0
    kept = [point for point in found if point[1] <= _PAUSE * usual]
    steps, values, times = zip(*sorted(kept), strict=True) if kept else ((), (), ())
    return Curve(curve.folder, "seconds a step", steps, values, times)
