"""The page of a run: one file, no network, no script, light or dark as the reader's system is."""

import datetime
import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from distopt.errors import SettingError
from distopt.monitor.plots import draw, written
from distopt.monitor.records import Records, finite, read_records
from distopt.monitor.sections import TOLD_APART, Panel, Section, sort_curves
from distopt.monitor.style import STYLE

_MOST = 120
"""Plots of one page."""
_CARDS = 10
_WANTED = {
    "Saving": ("saving", "matrix_saving"),
    "Errors of the compression": ("reconstruction_error", "worst_reconstruction_error"),
    "Losses": (),
    "Steps": ("seconds a step", "seconds_per_step", "skipped_steps", "skipped"),
}
"""What the summary tells of each section; of losses all."""
_WORDS = {
    "saving": "bytes not sent",
    "matrix_saving": "not sent of matrices",
    "reconstruction_error": "reconstruction error",
    "worst_reconstruction_error": "error of the worst layer",
    "seconds_per_step": "seconds a step",
    "skipped_steps": "skipped steps",
    "skipped": "skipped steps",
}


def write_report(run: Path, out: Path) -> Records:
    """Write the page of a run.

    Args:
        run: a folder with event files of TensorBoard, in it or below.
        out: the file; replaced if it is there.

    Returns:
        What was read.

    Raises:
        SettingError: there is nothing to read in ``run``, or ``out`` cannot be written.
        MissingPackageError: TensorBoard or matplotlib is not installed.
    """
    records = read_records(run)
    page = page_of(records, run.resolve().name)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise SettingError("--out", str(out), f"a file that can be written ({error.strerror})") from None
    return records


def page_of(records: Records, name: str) -> str:
    """Give the page of a run as HTML.

    Args:
        records: what was read.
        name: of the run, for the title.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    sections = sort_curves(records.curves)
    numbers = itertools.count()
    body = [
        f"<h1>{html.escape(name)}</h1>",
        f"<p>{_subtitle(records)}</p>",
        *(f'<p class="note">{html.escape(note)}</p>' for note in [*records.notes, *_cautions(records, sections)]),
        _summary(sections),
        *(_section(section, numbers) for section in sections),
        "<footer>Written by <code>distopt report</code>.</footer>",
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)} · distopt report</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _subtitle(records: Records) -> str:
    began = min(min(curve.times) for curve in records.curves)
    ended = max(max(curve.times) for curve in records.curves)
    last = max(curve.steps[-1] for curve in records.curves)
    when = datetime.datetime.fromtimestamp(began, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    files = "1 event file" if records.files == 1 else f"{records.files} event files"
    curves = "1 curve" if len(records.curves) == 1 else f"{len(records.curves)} curves"
    return f"From {when}, {_duration(ended - began)}; up to step {last:,}; {curves} in {files}."


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _cautions(records: Records, sections: Sequence[Section]) -> Iterator[str]:
    for curve in records.curves:
        if lost := len(curve.values) - len(finite(curve)):
            where = "" if curve.folder == "." else f" in {curve.folder}"
            yield f"{curve.tag}{where}: {lost} of {len(curve.values)} values are NaN or infinite: crosses in its plot"
    if (plots := sum(len(section.panels) for section in sections)) > _MOST:
        yield f"{plots} plots would be too many for a page: the first {_MOST} are shown"


def _summary(sections: Sequence[Section]) -> str:
    """The last values of what people ask for first: side by side for one source, a row each for several."""
    rows: dict[str, dict[str, str]] = {}
    for section in (section for section in sections if section.title in _WANTED):
        wanted = _WANTED[section.title]
        for panel in section.panels:
            for name in wanted or panel.curves:
                if points := finite(panel.curves[name]) if name in panel.curves else []:
                    value = _middle(points) if panel.look.axis == "seconds" else points[-1][1]
                    rows.setdefault(panel.source, {})[_WORDS.get(name, name)] = written(value, panel.look)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    if sum(map(len, rows.values())) <= _CARDS:
        cards = (
            f"<div><b>{text}</b><span>{html.escape(f'{source} · {name}' if source else name)}</span></div>"
            for source, row in rows.items()
            for name, text in row.items()
        )
        return f'<div class="cards">{"".join(cards)}</div>'
    lines = [["", *names], *([source, *(row.get(name, "") for name in names)] for source, row in rows.items())]
    return _tabulated(lines)


def _tabulated(lines: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head."""
    kinds = ["th", *("td" for _ in lines[1:])]
    rows = (
        "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in line) + "</tr>"
        for kind, line in zip(kinds, lines, strict=True)
    )
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _middle(points: Sequence[tuple[int, float]]) -> float:
    return sorted(value for _, value in points)[len(points) // 2]


def _section(section: Section, numbers: Iterator[int]) -> str:
    figures = [_figure(panel, number) for panel in section.panels if (number := next(numbers)) < _MOST]
    inner = f'<p>{html.escape(section.meaning)}</p><div class="plots">{"".join(figures)}</div>'
    if section.folded:
        inner = f"<details><summary>{len(figures)} plot{'s' * (len(figures) != 1)}</summary>{inner}</details>"
    return f"<section><h2>{html.escape(section.title)}</h2>{inner}</section>"


def _figure(panel: Panel, number: int) -> str:
    svg, legend = draw(panel, number)
    last = {name: written(curve.values[-1], panel.look) for name, curve in panel.curves.items()}
    entries = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)} {last.get(name, "")}</span>'
        for name, colour in legend.items()
    )
    table = _table(panel) if len(panel.curves) > TOLD_APART else "<div></div>"
    return f"<figure><figcaption><b>{html.escape(panel.title)}</b><br>{entries}</figcaption>{svg}{table}</figure>"


def _table(panel: Panel) -> str:
    """The last value of every curve, and its range."""
    ended: Mapping[str, list[float]] = {n: [value for _, value in finite(c)] for n, c in panel.curves.items()}
    order = sorted((n for n in ended if ended[n]), key=lambda n: ended[n][-1], reverse=not panel.look.lowest)
    lines = [["", "last", "lowest", "highest"]]
    for name in order:
        values = (ended[name][-1], min(ended[name]), max(ended[name]))
        lines.append([name, *(written(value, panel.look) for value in values)])
    return f"<details><summary>all {len(order)}</summary>{_tabulated(lines)}</details>"
