"""Puts distopt and torch's own PowerSGD hook to the same sixteen tests.

    python -m bench.robustness                       # about five minutes: torch's hook is waited for where it hangs
    python -m bench.robustness --cases inf resume

Cases whose failing depends on timing are run several times, and passed only if every run passes. Where torch's hook
fails, its control is run as well: the same case without what makes it hard. Prints a table, and writes JSON lines and a
markdown table.
"""

import argparse
import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.competitors import Competitor, Distopt, Torch
from bench.robustness.cases import CASES, Case, Run
from bench.stamp import markdown, write_lines
from tests.processes import RanksFailedError

OURS = (Distopt(),)
"""Editions of distopt to test: one line each."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What one competitor did in one case.

    Args:
        case: name of the case.
        competitor: name of the competitor.
        options: settings beyond its defaults.
        passed: runs that met the criterion.
        runs: runs.
        measured: how the runs ended, the most frequent first.
        control: whether the control passed, in every run; None if it was not run.
    """

    case: str
    competitor: str
    options: str
    passed: int
    runs: int
    measured: str
    control: bool | None = None

    @property
    def verdict(self) -> str:
        """PASS, or FAIL with how it failed."""
        return "PASS" if self.passed == self.runs else f"FAIL: {self.measured}"


def main() -> None:
    """Read the command line, run the matrix, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="*", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--repeats", type=int, default=5, help="runs of a case that depends on timing")
    parser.add_argument("--timeout", type=float, default=15.0, help="seconds after which a run counts as a hang")
    parser.add_argument("--ours-only", action="store_true", help="leave torch's hook out")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    results: list[Result] = []
    for case in (case for case in CASES if case.name in chosen.cases):
        for who in [*OURS, *([] if chosen.ours_only else rivals(case))]:
            results.append(test(case, who, chosen.repeats, chosen.timeout))
            last = results[-1]
            control = "" if last.control is None else f"   [control: {'passes' if last.control else 'FAILS'}]"
            print(f"{case.title:50} {who.label:28} {last.verdict}{control}", flush=True)
    write_lines(chosen.out / "robustness.jsonl", "robustness", [dataclasses.asdict(result) for result in results])
    table = markdown_table(results)
    (chosen.out / "robustness.md").write_text(table + "\n", encoding="utf-8")
    print("\n" + table)


def rivals(case: Case) -> list[Competitor]:
    """Torch's hook at its defaults, and as its documentation recommends for the case where that differs."""
    tuned = ", ".join(f"{name}={value}" for name, value in case.torch_options.items())
    return [Torch("torch"), *([Torch(f"torch, {tuned}", case.torch_options)] if tuned else [])]


def test(case: Case, who: Competitor, repeats: int, timeout: float) -> Result:
    """Run a case, as often as it needs, and its control if torch's hook failed."""
    runs = repeats if case.race else 1
    passed, measured = attempt(case.run, who, runs, timeout)
    control = None
    if isinstance(who, Torch) and passed < runs and case.control is not None:
        control = attempt(case.control, who, runs, timeout)[0] == runs
    return Result(case.name, who.label, str(dict(getattr(who, "options", {}))), passed, runs, measured, control)


def attempt(run: Run, who: Competitor, runs: int, timeout: float) -> tuple[int, str]:
    """How many of so many runs passed, and in words how they ended."""
    endings: collections.Counter[str] = collections.Counter()
    passed = 0
    for _ in range(runs):
        try:
            outcome = run(who, timeout)
        except RanksFailedError as error:
            endings[how_it_failed(str(error))] += 1
        else:
            passed += outcome.passed
            endings["passes" if outcome.passed and runs > 1 else outcome.measured] += 1
    if runs == 1:
        return passed, next(iter(endings))
    return passed, ", ".join(f"{what} {count} of {runs}" for what, count in endings.most_common())


def how_it_failed(text: str) -> str:
    """A short phrase for the stacks and tracebacks of failed ranks."""
    if "did not finish" in text:
        return "hangs"
    if "EnforceNotMet" in text or "died with exit code" in text or "Connection" in text:
        return "aborts (collectives of different ranks meet)"
    errors = re.findall(r"^(\w+(?:Error|Exception)): (.*)$", text, flags=re.MULTILINE)
    kind, message = errors[0] if errors else ("error", text.strip().splitlines()[-1])
    return f"{kind}: {message[:50]}{'...' if len(message) > 50 else ''}"


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The table of what was written, by its mark."""
    fields = [field.name for field in dataclasses.fields(Result)]
    return {"robustness": markdown_table([Result(**{name: record[name] for name in fields}) for record in records])}


def markdown_table(results: list[Result]) -> str:
    """One row a case: each edition of distopt, torch's hook, and torch's hook without what makes the case hard."""
    rows: list[list[str]] = []
    titles = {case.name: case for case in CASES}
    for name in dict.fromkeys(result.case for result in results):
        found = {r.competitor: r for r in results if r.case == name}
        ours = [found[who.label].verdict for who in OURS]
        theirs = [(label.removeprefix("torch, "), r) for label, r in found.items() if label.startswith("torch")]
        verdicts = "; ".join(r.verdict + (f" (with {label})" if label != "torch" else "") for label, r in theirs)
        controls = [r.control for _, r in theirs if r.control is not None]
        control = "" if not controls else "passes" if all(controls) else "fails too"
        rows.append([titles[name].title, titles[name].criterion, *ours, verdicts, control])
    head = [
        "case",
        "passes if",
        *(who.label for who in OURS),
        "torch's `powerSGD_hook`",
        "the same without the difficulty",
    ]
    return markdown(head, rows)


if __name__ == "__main__":
    main()
