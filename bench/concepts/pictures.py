"""The pictures of docs/concepts, drawn from the curves."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from bench.concepts import curves
from bench.concepts.curves import Curves

_INK, _FAINT, _RULE, _PALE = "#1f2328", "#656d76", "#d0d7de", "#dbe7f3"
_BLUE, _ORANGE, _RED, _GREEN = "#1f78b4", "#f39c12", "#d73027", "#2e8b57"


def draw(name: str, found: Curves, path: Path) -> None:
    """Draw a picture.

    Args:
        name: one of `DRAWN`.
        found: what its function has computed.
        path: the PNG to write.
    """
    _, title, panels = DRAWN[name]
    # A figure of its own, without pyplot: drawing must not depend on what display there is, or change global state.
    figure = Figure(figsize=(9, 3.3), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=10.5, fontweight="bold", color=_INK)
    panels(figure, found)
    whole = io.BytesIO()
    figure.savefig(whole)
    Image.open(whole).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def _power_iteration(figure: Figure, found: Curves) -> None:
    left, right = figure.subplots(1, 2)
    values, rank = found["values"], found["rank"]
    left.bar(range(1, rank + 1), values[:rank], color=_BLUE, label=f"what rank {rank} can hold")
    left.bar(range(rank + 1, 33), values[rank:32], color=_RULE, label="what waits")
    _finish(left, "Singular values of the last gradient, the largest as 1", "number, of 128")
    steps = range(1, len(found["best"]) + 1)
    right.plot(steps, found["fresh"], color=_ORANGE, label="from a Gaussian at every step")
    right.plot(steps, found["warm"], color=_BLUE, label="from the factor of the step before")
    right.plot(steps, found["best"], color=_INK, linestyle=(0, (4, 2)), linewidth=1.2, label="the best there is")
    right.set_ylim(0, 0.75)
    _finish(right, f"Error of one iteration at rank {rank}, as a part of the gradient", "step of training")


def _error_feedback(figure: Figure, found: Curves) -> None:
    left, right = figure.subplots(1, 2)
    steps = range(1, len(found["with"]) + 1)
    for colour, fed, delivered in zip((_BLUE, _GREEN), found["fed"], found["delivered"], strict=True):
        left.plot(steps, fed, color=colour, linewidth=1, linestyle=(0, (3, 2)))
        left.step(steps, delivered, where="post", color=colour)
    left.plot([], [], color=_FAINT, linewidth=1, linestyle=(0, (3, 2)), label="fed, added up")
    left.plot([], [], color=_FAINT, label="delivered, added up")
    _finish(left, "Two numbers of a gradient under TopK(0.05)", "step")
    right.plot(steps, found["without"], color=_RED, label="without a residual")
    right.plot(steps, found["with"], color=_BLUE, label="with it")
    right.plot(steps, found["kept"], color=_INK, linestyle=(0, (1, 2)), label="norm of the residual")
    right.set_ylim(0, 1)
    _finish(right, "Not delivered under PowerSGD(2), as a part of all that was fed", "step")


def _transaction(figure: Figure, found: Curves) -> None:
    panels = dict(zip(("losses", "kept"), figure.subplots(1, 2), strict=True))
    for kind, axes in panels.items():
        steps = range(len(found["told"][kind]))
        axes.plot(steps, found["told"][kind], color=_PALE, linewidth=7, label="told to leave the step out")
        axes.plot(steps, found["dropped"][kind], color=_BLUE, label="met the NaN, and dropped the step")
        axes.plot(steps, found["without"][kind], color=_RED, linestyle=(0, (4, 2)), label="the papers' equations alone")
        axes.axvline(found["bad"], color=_FAINT, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_ylim(bottom=0)
    _finish(panels["losses"], "Loss", "step")
    _finish(panels["kept"], "Norm of rank 1's residual", "step")
    panels["kept"].annotate("a NaN on rank 1", (found["bad"], 0), (found["bad"] + 1, 2), fontsize=8, color=_FAINT)


def _overlap(figure: Figure, found: Curves) -> None:
    axes = figure.subplots()
    rates = [rate / 1e9 for rate in found["rates"]]
    floor = [max(wire, found["compute"]) for wire in found["wire"]]
    axes.fill_between(rates, floor, 0.01, color="#f3f4f6", label="floor of plain DDP: its bytes, or computing")
    for (label, seconds), colour in zip(found["seconds"].items(), (_INK, _BLUE, _ORANGE), strict=True):
        axes.plot(rates, seconds, color=colour, label=label if label == "plain DDP" else f"PowerSGD, {label}")
    axes.set(xscale="log", yscale="log", ylim=(0.06, 60), xlim=(rates[0], rates[-1]))
    axes.set_xticks([0.1, 1, 10, 100, 1000], ["0.1", "1", "10", "100", "1000"])
    axes.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    _finish(axes, "Seconds of a step", "bandwidth, Gbit/s")


def _scaling(figure: Figure, found: Curves) -> None:
    grid = figure.add_gridspec(3, 2)
    left = figure.add_subplot(grid[:, 0])
    octaves = found["octaves"]
    shades = (_RED, _ORANGE, _BLUE, _GREEN)
    for (name, errors), colour in zip(found["errors"].items(), shades, strict=True):
        finite = [(k, e) for k, e in zip(octaves, errors, strict=True) if e != float("inf")]
        left.step(*zip(*finite, strict=True), where="post", color=colour, label=name)
    left.set(yscale="log", ylim=(2e-4, 2))
    _finish(left, "What rounding takes, as a part of a number", "size of the number, octaves")
    before, behind = torch.tensor(found["before"]), torch.tensor(found["behind"])
    one = 15 - float(before.max())
    shifts = {"no scale": (0, 0), "one scale": (one, one), "a scale each": (one, 15 - float(behind.max()))}
    for row, (title, (first, second)) in enumerate(shifts.items()):
        axes = figure.add_subplot(grid[row, 1])
        axes.axvspan(-14, 16, color=_PALE)
        axes.axvspan(-24, -14, color="#eef3f8")
        for values, colour in ((before + first, _ORANGE), (behind + second, _BLUE)):
            axes.hist(values.tolist(), bins=range(-70, 41), color=colour, alpha=0.75)
        axes.set(xlim=(-66, 36), yticks=[])
        _finish(axes, title, "octaves; shaded: float16, pale: with fewer digits" if row == 2 else "", legend=False)


def _windows(figure: Figure, found: Curves) -> None:
    axes = figure.subplots()
    ends = [sum(found["tokens"][: place + 1]) for place in range(len(found["tokens"]))]
    tokens = range(len(found["means"]))
    axes.bar(tokens, found["means"], width=1, color=_ORANGE, label="mean of the four micro-batches' means")
    axes.step(
        [*tokens, len(tokens)], [*found["window"], found["window"][-1]], where="post", color=_BLUE, label="window"
    )
    for count, end in zip(found["tokens"], ends, strict=True):
        axes.axvline(end - 0.5, color="white", linewidth=2)
        axes.text(end - 0.5 - count / 2, 11.2, f"{count} tokens", ha="center", fontsize=8, color=_FAINT)
    axes.set(ylim=(0, 12.2), xlim=(-4, len(tokens)))
    _finish(axes, "What a token counts, a fair share as 1", "token of the window")


def _finish(axes: Axes, title: str, below: str, *, legend: bool = True) -> None:
    axes.set_title(title, loc="left", fontsize=9, color=_INK)
    axes.set_xlabel(below, fontsize=8, color=_FAINT)
    axes.tick_params(labelsize=8, colors=_FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    if legend:
        axes.legend(frameon=False, fontsize=8, labelcolor=_INK)


DRAWN: dict[str, tuple[Callable[[], Curves], str, Callable[[Figure, Curves], None]]] = {
    "power-iteration": (
        curves.power_iteration,
        "The middle layer of three that learn handwritten digits, 128 x 128",
        _power_iteration,
    ),
    "error-feedback": (
        curves.error_feedback,
        "What is not sent is sent later: a steady 32 x 32 gradient with noise, two ranks",
        _error_feedback,
    ),
    "transaction": (curves.transaction, "One rank's gradient holds a NaN at step 15", _transaction),
    "overlap": (
        curves.overlap,
        "100 million parameters in 24 layers on 16 ranks, 0.1 s of computing: predicted by distopt.plan",
        _overlap,
    ),
    "scaling": (
        curves.formats,
        "16-bit formats, and weight gradients of two branches that are 37 octaves apart",
        _scaling,
    ),
    "windows": (curves.windows, "One optimizer step, four micro-batches of 5, 60, 17 and 128 tokens", _windows),
}
"""By name: what is computed, the title, and how it is drawn."""
