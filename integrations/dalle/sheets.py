"""Draws what people look at: sheets of captioned pictures, and the curves of a run.

Sheets are drawn at twice the size at which a page shows them (`WIDTH` is 900 pixels there), so that text stays crisp on
fine screens. Small pictures are enlarged without smoothing: what the model drew is what one sees.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

WIDTH = 1800
_MARGIN = 40
_GAP = 22
_FRAME = 6
_MARK = 40
_INK, _FAINT, _RULE = "#1f2328", "#656d76", "#d0d7de"
_RIGHT, _WRONG, _NEUTRAL = "#1a9850", "#d73027", "#d0d7de"
_MAX_CAPTION_LINES = 4
_MAX_LEGEND = 16


@dataclass(frozen=True)
class Cell:
    """One entry of a sheet.

    Args:
        pictures: uint8 ``(size, size, 3)`` each, shown side by side.
        caption: shown below.
        right: framed and marked green if true, red if false, neutral if ``None``.
    """

    pictures: Sequence[np.ndarray]
    caption: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Section:
    """A titled group of cells.

    Args:
        title: at the left, bold; no heading is drawn if it is empty.
        note: at the right of the title.
        cells: in reading order.
    """

    title: str
    note: str
    cells: Sequence[Cell]


def draw_sheet(path: Path, sections: Sequence[Section], *, columns: int, footer: str = "") -> None:
    """Draw sections of cells below one another and write them as PNG.

    Args:
        path: the file to write.
        sections: from top to bottom; all cells have the same number of pictures of one size.
        columns: cells in a row.
        footer: a faint line at the bottom.
    """
    # As wide as the columns that are in use: three cells of eight must not leave an empty page.
    columns = min(columns, max(len(section.cells) for section in sections))
    blocks = [_draw_section(section, columns) for section in sections]
    bottom = 44 if footer else 0
    height = _MARGIN + sum(block.height + _GAP for block in blocks) + bottom + _MARGIN - _GAP
    sheet = Image.new("RGB", (WIDTH, height), "white")
    top = _MARGIN
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height + _GAP
    if footer:
        ImageDraw.Draw(sheet).text((_MARGIN, height - _MARGIN), footer, fill=_FAINT, font=_font(20), anchor="ls")
    sheet.save(path, optimize=True)


def draw_picture(path: Path, picture: np.ndarray, side: int = 256) -> None:
    """Write one uint8 ``(size, size, 3)`` picture, enlarged without smoothing to at least ``side`` pixels."""
    factor = max(1, math.ceil(side / len(picture)))
    Image.fromarray(_enlarge(picture, factor)).save(path, optimize=True)


def draw_losses(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Draw one panel a stage: every step's loss faintly, its running mean on top.

    Args:
        path: the file to write.
        curves: steps and losses by the panel's title; losses that are not finite leave a gap.
    """
    # A figure of its own, without pyplot: drawing must not depend on what display there is, or change global state.
    figure = Figure(figsize=(9, 3.2), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, curve) in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True):
        steps, losses = np.array(curve, dtype=float).reshape(-1, 2).T
        axes.plot(steps, losses, color="#9ecae9", linewidth=0.6)
        smooth = _running_mean(losses, max(1, len(losses) // 100))
        axes.plot(steps, smooth, color="#1f5a96", linewidth=1.6)
        shown = losses[np.isfinite(losses) & (losses > 0)]
        if len(shown) and shown.max() > 20 * shown.min() and (losses[np.isfinite(losses)] > 0).all():
            axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK)
        axes.set_xlabel("step", color=_FAINT)
        _plain(axes)
    figure.savefig(path)


def draw_scales(path: Path, scales: Sequence[tuple[int, Mapping[str, float]]]) -> None:
    """Draw how gradient scales went over a run, as powers of two.

    Args:
        path: the file to write.
        scales: steps, and the scales after them by name; the first layers come first, and are darkest.
    """
    figure = Figure(figsize=(9, 3.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps, names = [step for step, _ in scales], list(scales[0][1])
    for place, name in enumerate(names):
        octaves = [math.log2(values[name]) for _, values in scales]
        colour = matplotlib.colormaps["viridis"](0.9 * place / max(1, len(names) - 1))
        axes.plot(steps, octaves, color=colour, linewidth=1.4, label=name)
    axes.set_title("Gradient scale of each residual branch", loc="left", fontsize=10, fontweight="bold", color=_INK)
    axes.set_xlabel("step", color=_FAINT)
    axes.set_ylabel("log2", color=_FAINT)
    if len(names) <= _MAX_LEGEND:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), labelcolor=_INK)
    _plain(axes)
    figure.savefig(path)


def _plain(axes: Axes) -> None:
    axes.grid(color=_RULE, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_FAINT)


def _draw_section(section: Section, columns: int) -> Image.Image:
    cell_width = (WIDTH - 2 * _MARGIN + _GAP) // columns - _GAP
    marked = any(cell.right is not None for cell in section.cells)
    cells = [_draw_cell(cell, min(cell_width, 640), marked) for cell in section.cells]
    heading = 62 if section.title else 0
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    block = Image.new("RGB", (WIDTH, heading + sum(heights) + _GAP * (len(rows) - 1)), "white")
    if section.title:
        draw = ImageDraw.Draw(block)
        draw.text((_MARGIN, 30), section.title, fill=_INK, font=_font(30, bold=True), anchor="ls")
        draw.text((WIDTH - _MARGIN, 30), section.note, fill=_FAINT, font=_font(26), anchor="rs")
        draw.line([(_MARGIN, 44), (WIDTH - _MARGIN, 44)], fill=_RULE, width=2)
    top = heading
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            block.paste(cell, (_MARGIN + column * (cell_width + _GAP) + (cell_width - cell.width) // 2, top))
        top += height + _GAP
    return block


def _draw_cell(cell: Cell, width: int, marked: bool) -> Image.Image:
    """Pictures in a frame with the caption below, ``width`` pixels wide, with room for a mark if others have one."""
    count, size = len(cell.pictures), len(cell.pictures[0])
    factor = max(1, (width - 2 * _FRAME - (count - 1) * _FRAME) // (count * size))
    side = factor * size
    frame_width = count * side + (count + 1) * _FRAME
    left = (width - frame_width) // 2
    font = _font(21)
    lines = _wrap(cell.caption, font, width)
    # The mark sits on the frame's corner and sticks out, so that it hides nothing of the picture but its very corner.
    top = _MARK // 2 - 6 if marked else 0
    bottom = top + side + 2 * _FRAME
    image = Image.new("RGB", (width, bottom + (8 + 27 * len(lines) if lines else 0)), "white")
    draw = ImageDraw.Draw(image)
    colour = {True: _RIGHT, False: _WRONG, None: _NEUTRAL}[cell.right]
    draw.rounded_rectangle([left, top, left + frame_width - 1, bottom - 1], radius=8, fill=colour)
    for i, picture in enumerate(cell.pictures):
        enlarged = Image.fromarray(_enlarge(picture, factor))
        image.paste(enlarged, (left + _FRAME + i * (side + _FRAME), top + _FRAME))
    if cell.right is not None:
        image.paste(_mark(cell.right), (min(left + frame_width - _MARK // 2 - 6, width - _MARK), 0), _mark(cell.right))
    for i, line in enumerate(lines):
        draw.text((width / 2, bottom + 29 + 27 * i), line, fill=_INK, font=font, anchor="ms")
    return image


@functools.cache
def _mark(right: bool, size: int = _MARK) -> Image.Image:
    """A tick or a cross on a disc, for those who cannot tell green from red; drawn large and reduced, to be smooth."""
    fine = 4 * size
    mark = Image.new("RGBA", (fine, fine), (0, 0, 0, 0))
    draw = ImageDraw.Draw(mark)
    draw.ellipse([0, 0, fine - 1, fine - 1], fill="white")
    draw.ellipse([fine * 0.06, fine * 0.06, fine * 0.94, fine * 0.94], fill=_RIGHT if right else _WRONG)
    tick = [(0.28, 0.52), (0.44, 0.68), (0.73, 0.35)]
    strokes = [tick] if right else [[(0.32, 0.32), (0.68, 0.68)], [(0.32, 0.68), (0.68, 0.32)]]
    for stroke in strokes:
        draw.line([(x * fine, y * fine) for x, y in stroke], fill="white", width=fine // 10, joint="curve")
    return mark.resize((size, size), Image.Resampling.LANCZOS)


def _enlarge(picture: np.ndarray, factor: int) -> np.ndarray:
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Break a text into lines of at most ``width`` pixels; what is too long ends with an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > _MAX_CAPTION_LINES:
        lines = [*lines[: _MAX_CAPTION_LINES - 1], lines[_MAX_CAPTION_LINES - 1] + "…"]
    return [_shorten(line, font, width) for line in lines]


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    while len(line) > 1 and font.getlength(line) > width:
        line = line[:-2] + "…"
    return line


@functools.cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib brings this font along: it has most alphabets, and no system font is needed.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the values around each place, ``window`` to either side, of fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts, ends = np.maximum(0, places - window), np.minimum(len(values), places + window + 1)
    return (sums[ends] - sums[starts]) / (ends - starts)
