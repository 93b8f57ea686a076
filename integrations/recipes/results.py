"""Results of several seeds: mean and spread, as a table and as JSON."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Spread:
    """Values of one figure, one a seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Their standard deviation; NaN for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def text(self, digits: int = 2) -> str:
        """As a table shows it.

        Example:
            >>> Spread((1.0, 2.0, 3.0)).text()
            '2.00 ± 1.00'
        """
        around = "" if len(self.values) == 1 else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{around}"


class Results:
    """Figures by way and name, collected seed after seed.

    Example:
        >>> results = Results()
        >>> results.add("equal", {"error": 1.0})
        >>> results.add("equal", {"error": 3.0})
        >>> print(results.table({"error": ("error, %", 1)}))
        | | error, % |
        |---|--:|
        | equal | 2.0 ± 1.4 |
    """

    def __init__(self) -> None:
        self._figures: dict[str, dict[str, list[float]]] = {}

    def add(self, way: str, figures: Mapping[str, float]) -> None:
        """Take the figures of one more seed."""
        for name, value in figures.items():
            self._figures.setdefault(way, {}).setdefault(name, []).append(value)

    def spread(self, way: str, name: str) -> Spread | None:
        """A figure of a way over all seeds; ``None`` if the way has none of that name."""
        values = self._figures[way].get(name)
        return None if values is None else Spread(tuple(values))

    def against(self, way: str, control: str, name: str) -> Spread:
        """Differences to the control, seed by seed."""
        pairs = zip(self._figures[way][name], self._figures[control][name], strict=True)
        return Spread(tuple(mine - its for mine, its in pairs))

    def table(self, columns: Mapping[str, tuple[str, int]]) -> str:
        """A Markdown table, a row a way.

        Args:
            columns: heading and digits after the point, by figure.
        """
        rows = [["", *(heading for heading, _ in columns.values())]]
        for way in self._figures:
            spreads = [(self.spread(way, name), digits) for name, (_, digits) in columns.items()]
            rows.append([way, *("" if spread is None else spread.text(digits) for spread, digits in spreads)])
        return markdown(rows)

    def as_json(self) -> dict[str, Any]:
        """Values, mean and standard deviation, by way and figure."""
        return {
            way: {
                name: {"mean": Spread(tuple(v)).mean, "deviation": _finite(Spread(tuple(v)).deviation), "values": v}
                for name, v in figures.items()
            }
            for way, figures in self._figures.items()
        }


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first row is the heading, the first column names the rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines[0] = lines[0].replace("|  |", "| |", 1)
    return "\n".join([lines[0], "|---|" + "--:|" * (len(rows[0]) - 1), *lines[1:]])


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` at once or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
