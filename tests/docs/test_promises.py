"""The tests that pages name for what they promise are there, and what the paper's map names, too."""

import ast
import re
from functools import cache

import pytest

from tests.docs.pages import PAGES, ROOT

RELIABILITY = (ROOT / "docs/reliability.md").read_text()
BACKED = re.compile(r"\[`(test_\w+)`\]\(([^)]*)\)")


@cache
def functions_of(file):
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def section(text, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]


def rows(text):
    """Of a table without its head, cell by cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_tests_are_there(page):
    text = page.read_text()
    for name, link in BACKED.findall(text):
        assert name in functions_of(page.parent / link), f"{link} has no {name}"
    for file in re.findall(r"\btests/[\w/]+\.py", text):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize(
    ("page", "title", "bullet", "count"),
    [("reliability", "Promises", r"\d+\. ", 7), ("checkpoint", "What holds", r"- ", 10)],
)
def test_each_promise_names_its_tests(page, title, bullet, count):
    text = section((ROOT / f"docs/{page}.md").read_text(), title)
    promises = re.split(rf"^{bullet}", text, flags=re.MULTILINE)[1:]
    assert len(promises) == count
    for promise in promises:
        assert BACKED.search(promise), promise


def test_each_difference_from_torch_names_its_test():
    differences = rows(section(RELIABILITY, "Beside torch's own hook"))
    assert len(differences) == 8
    for _, _, _, test in differences:
        assert BACKED.fullmatch(test), test


def test_each_count_is_one_that_a_test_tells():
    told = {
        node.value
        for name in [link for _, link in BACKED.findall(section(RELIABILITY, "Promises"))]
        for node in ast.walk(ast.parse((ROOT / "docs" / name).read_text()))
        if isinstance(node, ast.Constant)
    }
    counted = rows(section(RELIABILITY, "Counts"))
    assert len(counted) == 9
    for what, trials, passed, _ in counted:
        assert what in told, f"no test of a promise records the promise {what!r}"
        assert trials == passed
