"""Try every promise as often as it says, and write the counts into docs/reliability.md.

Run it from the repository's root: ``python -m tests.faults.report``, with files of tests to try these alone. Tests tell
what they have tried by pytest's ``record_property``: the promise, trials, and how many passed.
"""

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
WHERE = ["tests/faults", "tests/integrations/dalle/test_checkpoints.py"]
BEGIN, END = "<!-- counts -->\n", "<!-- end of counts -->\n"


@dataclasses.dataclass
class Row:
    """What became of one promise."""

    trials: int = 0
    passed: int = 0
    seconds: float = 0.0


class Counter:
    """A pytest plugin that adds up what tests report."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each phase of each test."""
        told = dict(report.user_properties)
        if report.when == "call" and "promise" in told:
            row = self.rows.setdefault(str(told["promise"]), Row())
            row.trials += int(str(told["trials"]))
            row.passed += int(str(told["passed"]))
            row.seconds += report.duration

    def lines(self) -> dict[str, str]:
        """A line of Markdown for each promise."""
        return {name: f"| {name} | {r.trials:,} | {r.passed:,} | {r.seconds:.0f} |" for name, r in self.rows.items()}


def write(lines: Mapping[str, str], page: Path) -> None:
    """Put lines into the table between the marks of a page, in place of those of the same promises."""
    before, rest = page.read_text().split(BEGIN)
    table, after = rest.split(END)
    head, rule, *rows = table.splitlines()
    table = {row.split("|")[1].strip(): row for row in rows} | lines
    page.write_text(before + BEGIN + "\n".join([head, rule, *table.values()]) + "\n" + END + after)


if __name__ == "__main__":
    os.environ["DISTOPT_TESTS"] = "full"
    counter = Counter()
    failed = pytest.main(["-q", "-p", "no:cacheprovider", *(sys.argv[1:] or WHERE)], plugins=[counter])
    write(counter.lines(), PAGE)
    sys.exit(failed)
