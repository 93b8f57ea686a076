"""Tables come from results into the pages, and only there; where there are no results, pages stay as they are."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import __main__ as command
from bench.listed import BENCHES, Bench
from bench.pages import PageError, fill, render, stamp_line
from bench.stamp import read_lines, write_lines

DOCS = Path(__file__).parents[2] / "docs"
TEXT = st.text(st.characters(exclude_characters="<>\r", exclude_categories=["Cs"]), max_size=30)


@given(TEXT, TEXT, TEXT, TEXT)
def test_what_stands_between_the_marks_is_replaced_and_nothing_else(before, old, new, after):
    page = f"{before}<!-- a -->\n{old}\n<!-- end of a -->{after}<!-- b -->\nkept\n<!-- end of b -->"
    filled = fill(page, {"a": new})
    assert filled == f"{before}<!-- a -->\n{new}\n<!-- end of a -->{after}<!-- b -->\nkept\n<!-- end of b -->"
    assert fill(filled, {"a": new}) == filled
    assert fill(page, {"other": new}) == page


def test_an_empty_place_is_filled():
    assert fill("<!-- a -->\n<!-- end of a -->\n", {"a": "t"}) == "<!-- a -->\nt\n<!-- end of a -->\n"


def test_a_mark_without_an_end_is_refused():
    with pytest.raises(PageError, match="<!-- a --> has no end"):
        fill("<!-- a -->\ntable\n", {"a": "t"})


def test_records_come_back_as_they_were_written(tmp_path):
    records = [{"a": [1, 2.5, float("inf")], "b": None, "c": "inf"}, {"d": {"e": float("-inf")}}]
    write_lines(tmp_path / "x.jsonl", "x", records)
    back = read_lines(tmp_path / "x.jsonl")
    assert [{key: found[key] for key in record} for found, record in zip(back, records, strict=True)] == records
    assert all("torch " in stamp_line([found]) and "cores" in stamp_line([found]) for found in back)


ROBUSTNESS = Bench("robustness", "bench.robustness")
RESULT = {
    "case": "inf",
    "competitor": "distopt",
    "options": "{}",
    "passed": 1,
    "runs": 1,
    "measured": "",
    "control": None,
}


def test_missing_results_leave_the_old_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- robustness -->\nold\n<!-- end of robustness -->\n", encoding="utf-8")
    before = page.read_text(encoding="utf-8")
    assert render([ROBUSTNESS], tmp_path / "none", tmp_path) == []
    assert page.read_text(encoding="utf-8") == before
    write_lines(tmp_path / "runs/robustness.jsonl", "robustness", [RESULT])
    assert render([ROBUSTNESS], tmp_path / "runs", tmp_path) == []
    assert "| one infinity on one rank |" in page.read_text(encoding="utf-8")
    assert "old" not in page.read_text(encoding="utf-8")


def test_a_table_without_a_place_is_named(tmp_path):
    write_lines(tmp_path / "robustness.jsonl", "robustness", [RESULT])
    assert render([ROBUSTNESS], tmp_path, tmp_path) == ["robustness"]


def test_the_command_renders_without_running_anything(tmp_path, monkeypatch):
    write_lines(tmp_path / "robustness.jsonl", "robustness", [RESULT])
    page = tmp_path / "page.md"
    page.write_text("<!-- robustness -->\n<!-- end of robustness -->\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["bench", "--render", "--out", str(tmp_path), "--docs", str(tmp_path)])
    monkeypatch.setattr(command, "_ran", None)
    command.main()
    assert "PASS" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("code", "ending"), [(0, None), (2, None), (1, "failed: job")])
def test_a_bench_that_cannot_run_here_is_no_failure(tmp_path, monkeypatch, code, ending):
    (tmp_path / "job.py").write_text(f"import sys; sys.exit({code})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "BENCHES", [Bench("job", "job")])
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path), "--docs", str(tmp_path)])
    if ending is None:
        command.main()
    else:
        with pytest.raises(SystemExit, match=ending):
            command.main()


def test_benches_have_different_names_and_marks_of_the_pages_are_in_pairs():
    assert len({bench.name for bench in BENCHES}) == len(BENCHES)
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        ends = re.findall(r"^<!-- end of ([\w-]+) -->$", text, re.MULTILINE)
        assert len(ends) == len(set(ends))
        assert all(f"<!-- {name} -->\n" in text for name in ends), page


def test_a_line_of_results_is_plain_json(tmp_path):
    write_lines(tmp_path / "x.jsonl", "x", [{"a": float("nan")}])
    assert json.loads((tmp_path / "x.jsonl").read_text(), parse_constant=pytest.fail)["a"] == "NaN"
