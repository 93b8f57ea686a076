"""Tables of steps: one a workload and layout, a row a way, two columns a network."""

import statistics
from collections.abc import Sequence

from bench.epfml import HOW_TO_INSTALL
from bench.lab.figures import EMPTY, Figures, Record
from bench.lab.targets import Target, link_name
from bench.lab.ways import EPFML
from bench.lab.workloads import WORKLOADS
from bench.stamp import markdown

NOT_MEASURED = f"not measured: not installed (`{HOW_TO_INSTALL}`; what the package index has holds no code)"


def step_tables(records: Sequence[Record]) -> dict[str, str]:
    """A table for each workload and layout that was measured, as ``lab-LAYOUT-WORKLOAD``."""
    places = dict.fromkeys((r["layout"], r["workload"]) for r in records if "seconds" in r)
    return {f"lab-{layout}-{workload}": _table(records, layout, workload) for layout, workload in places}


def _table(records: Sequence[Record], layout: str, workload: str) -> str:
    mine = [r for r in records if (r["layout"], r["workload"]) == (layout, workload) and not r["alone"]]
    figures = Figures(records)
    limits = list(dict.fromkeys(r["megabits"] for r in mine))
    replicated = layout == "replicated"
    head = ["", "MB sent", *(["compression alone, ms"] if replicated else [])]
    for megabits in limits:
        beyond = "beyond, ms" if megabits is None else "beyond, ms (floor)"
        head += [f"{link_name(megabits)}: step, ms", beyond]
    rows: list[list[str]] = []
    for way in dict.fromkeys(r["way"] for r in mine):
        found = [r for r in mine if r["way"] == way]
        alone = figures.compression(found[0])
        sent = statistics.median(statistics.median(r["sent"]) for r in found) / 1e6
        row = [way, f"{sent:.2f}", *([alone.text(1e3) if alone and way not in EMPTY else ""] if replicated else [])]
        for megabits in limits:
            row += _cells(next((r for r in found if r["megabits"] == megabits), None), figures)
        rows.append(row)
    if replicated and all(r["way"] != EPFML for r in mine):
        rows.append([EPFML, NOT_MEASURED, *[""] * (len(head) - 2)])
    return f"{_subject(mine[0])}\n\n{markdown(head, rows)}"


def _cells(record: Record | None, figures: Figures) -> list[str]:
    if record is None:
        return ["", ""]
    step, exposed, floor = figures.step(record).text(1e3), figures.exposed(record), figures.floor(record)
    if exposed is None or record["way"] in EMPTY:
        return [step, ""]
    return [step, exposed.text(1e3) + ("" if floor is None else f"; {1e3 * floor:.0f}")]


def _subject(record: Record) -> str:
    """What the table is about, in a line."""
    workload = WORKLOADS[record["workload"]].title
    shape = f"{record['ring']} ranks" if record["rings"] == 1 else f"{record['ring']} nodes x {record['rings']} shards"
    rounds = len(record["seconds"])
    megabytes = record["model_bytes"] / 1e6
    return (
        f"**{workload}**, {megabytes:.1f} MB, {record['rows']} rows a rank, {shape}; medians and quartiles of {rounds}:"
    )


def target_table(found: Sequence[Target]) -> str:
    """One row a target."""
    rows = [[t.way, t.link, t.text, t.measured, "met" if t.met else "**not met**"] for t in found]
    return markdown(["whose", "network", "target", "measured", ""], rows)
