"""The curves of the simulation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_INK, _FAINT, _RULE = "#1f2328", "#656d76", "#d0d7de"
_COLOURS = {"paper-2.8b": "#1f78b4", "paper-5.6b": "#f39c12", "paper-12b": "#d73027"}


def draw(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw which part of a step is spent computing, over the number of ranks; a panel for each link."""
    rates = sorted({record["gigabits"] for record in records})
    # A figure of its own, without pyplot: drawing must not depend on what display there is, or change global state.
    figure = Figure(figsize=(3.4 * len(rates), 3.9), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        "Predicted: forward and backward as a part of the step, 8 GPUs a machine",
        x=0.012,
        ha="left",
        fontsize=11,
        fontweight="bold",
        color=_INK,
    )
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for panel, rate in zip(panels, rates, strict=True):
        for preset, colour in _COLOURS.items():
            for wire, way, style in (
                ("float16", "plain_seconds", (0, (1, 1))),
                ("float32", "ranked_seconds", (0, (4, 2))),
                ("float16", "ranked_seconds", "-"),
            ):
                mine = sorted(
                    (r["world"], 100 * r["compute_seconds"] / r[way])
                    for r in records
                    if (r["gigabits"], r["preset"], r["wire"]) == (rate, preset, wire)
                )
                if mine:
                    panel.plot(*zip(*mine, strict=True), color=colour, linestyle=style, linewidth=1.4)
        panel.set_xscale("log", base=2)
        panel.set_title(f"{rate} Gbit/s a machine", loc="left", fontsize=10, fontweight="bold", color=_INK)
        ticks = [8, 64, 512, 4096, 16384]
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.set_xlabel("ranks", fontsize=8, color=_FAINT)
        panel.set_ylim(0, 104)
        panel.grid(color=_RULE, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8, colors=_FAINT)
    panels[0].set_ylabel("% of the step", fontsize=8, color=_FAINT)
    for preset, colour in _COLOURS.items():
        panels[0].plot([], [], color=colour, label=preset.removeprefix("paper-").replace("b", " billion"))
    for label, style in (
        ("plain DDP", (0, (1, 1))),
        ("PowerSGD, float32 factors", (0, (4, 2))),
        ("PowerSGD, float16 factors", "-"),
    ):
        panels[0].plot([], [], color=_FAINT, linestyle=style, label=label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8, labelcolor=_INK)
    figure.savefig(path)
