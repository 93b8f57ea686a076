"""Try every promise as often as it says, and write the counts into docs/reliability.md.

Run it from the repository's root: ``python -m tests.faults.report``. Tests tell what they have tried by pytest's
``record_property``: the promise, trials, and how many passed.
"""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
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

    def table(self) -> str:
        """In Markdown."""
        lines = ["| what was tried | trials | passed | seconds |", "|---|--:|--:|--:|"]
        lines += [f"| {name} | {r.trials:,} | {r.passed:,} | {r.seconds:.0f} |" for name, r in self.rows.items()]
        return "\n".join(lines) + "\n"


def write(table: str, page: Path) -> None:
    """Put a table between the marks of a page."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + BEGIN + table + END + rest.split(END)[1])


if __name__ == "__main__":
    os.environ["DISTOPT_TESTS"] = "full"
    counter = Counter()
    failed = pytest.main(["-q", "-p", "no:cacheprovider", *(sys.argv[1:] or ["tests/faults"])], plugins=[counter])
    write(counter.table(), PAGE)
    sys.exit(failed)
