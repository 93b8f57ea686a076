"""Tables: losses at equal steps, one table a task; and losses at equal time."""

import statistics
from collections.abc import Iterable, Sequence

from bench.lab.figures import Spread
from bench.lab.targets import link_name
from bench.quality.figures import Group, Record, Times, at_equal_time, groups, over_seeds
from bench.quality.ways import Way
from bench.stamp import markdown

TARGET = 0.01
"""By what part a held-out loss may be above that of exact averages."""
TITLES = {"dalle": "the DALL-E demo, stage 2", "text": "a character-level transformer"}
PRECISION = "fp32"
"""Of equal time: on a CPU 16-bit products are emulated, which takes time that says nothing."""


def tables(records: Sequence[Record]) -> dict[str, str]:
    """By their marks in docs/benchmarks.md."""
    found = groups(records)
    tasks = dict.fromkeys(group.task for group in found)
    steps = {f"quality-{task}": _steps_table([g for g in found if g.task == task]) for task in tasks}
    times = Times(records)
    timed = [table for group in widest(found) if (table := _time_table(group, times))]
    return {**steps, **({"quality-time": "\n\n".join(timed)} if timed else {})}


def widest(found: Iterable[Group]) -> list[Group]:
    """Of each task the group in float32 that has most ways, the first of several: what equal time is read from."""
    chosen: dict[str, Group] = {}
    for group in found:
        before = chosen.get(group.task)
        if group.precision == PRECISION and (before is None or len(group.ways) > len(before.ways)):
            chosen[group.task] = group
    return list(chosen.values())


def _steps_table(found: Sequence[Group]) -> str:
    head = ["steps", "precision", "way", "seeds", "bytes saved", "held-out loss", "above AllReduce"]
    rows = [_steps_row(group, way) for group in found for way in group.ways]
    return markdown([*head, f"at most {100 * TARGET:g} %", "training loss above", "AllReduce as far after"], rows)


def _steps_row(group: Group, way: Way) -> list[str]:
    seeds, saving = group.seeds(way), statistics.fmean(_savings(group, way))
    row = [f"{group.steps:,}", group.precision, way.label, str(len(seeds)), f"{100 * saving:.1f} %"]
    row.append(_range(group.held_out(way), "{:.4f}"))
    away = group.away(way)
    if way.rank == 0 or not away:
        return [*row, *[""] * 4]
    mean = over_seeds(away.values())
    verdict = "met" if mean.middle <= TARGET else "**not met**"
    behind = group.exact_steps(way)
    row += [_percents(mean), verdict, _percents(over_seeds(group.away(way, "train").values()))]
    return [*row, "" if behind is None else f"{behind:,} steps"]


def _savings(group: Group, way: Way) -> list[float]:
    return [group.runs[way.label, seed]["saving"] for seed in group.seeds(way)]


def _time_table(group: Group, times: Times) -> str:
    limits = times.limits(group.task)
    reached = {limit: at_equal_time(group, times, limit) for limit in limits}
    ways = [way for way in group.ways if any(way in found for found in reached.values())]
    if not ways:
        return ""
    head = ["way"]
    for limit in limits:
        head += [f"{link_name(limit)}: step, ms", "steps taken", "training loss"]
    rows: list[list[str]] = []
    for way in ways:
        row = [way.label]
        for limit in limits:
            losses = [loss for _, loss in reached[limit].values() if loss is not None]
            taken, loss = reached[limit].get(way, (0, None))
            row += _time_cells(times.step(group.task, way, limit), taken, loss, min(losses, default=None))
        rows.append(row)
    return f"**{TITLES[group.task]}**, {group.steps:,} steps:\n\n{markdown(head, rows)}"


def _time_cells(step: float | None, taken: int, loss: float | None, least: float | None) -> list[str]:
    """The least loss over a network is printed in bold."""
    if step is None:
        return ["", "", ""]
    text = "" if loss is None else f"{loss:.4f}"
    return [f"{1e3 * step:.1f}", f"{taken:,}", f"**{text}**" if text and loss == least else text]


def _percents(found: Spread) -> str:
    return _range(Spread(*(100 * value for value in found)), "{:+.2f}") + " %"


def _range(found: Spread, form: str) -> str:
    """The mean, and from where to where; the mean alone where that is all.

    Example:
        >>> _range(Spread(1.0, 2.0, 4.0), "{:.1f}"), _range(Spread(1.0, 1.0, 1.0), "{:.1f}")
        ('2.0 (1.0 to 4.0)', '1.0')
    """
    low, middle, high = (form.format(value) for value in found)
    return middle if low == high else f"{middle} ({low} to {high})"
