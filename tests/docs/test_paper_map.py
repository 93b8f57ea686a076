"""What docs/paper-map.md names is there: files, what is defined in them, settings and presets."""

import ast
import dataclasses
import re

import pytest
from distopt.integrations.dalle.settings import TrainSettings

from tests.docs.pages import ROOT

PAGE = (ROOT / "docs/paper-map.md").read_text()
DALLE, OTHERS = PAGE.split("## Other papers")
ROWS = [
    (folder, row)
    for folder, text in (("integrations/dalle", DALLE), ("integrations", OTHERS))
    for row in re.findall(r"^\| (?!section|paper).*$", text, re.MULTILINE)
]


def defined(file):
    """Functions, classes, and methods of classes as ``Class.method``, in a file."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))


def where(row):
    """The third cell; a bar within a cell would be escaped."""
    return re.split(r"(?<!\\)\|", row)[3]


@pytest.mark.parametrize(("folder", "row"), ROWS)
def test_what_is_named_is_where_the_map_says(folder, row):
    file, symbols = None, 0
    for name in re.findall(r"`([^`]+)`", where(row)):
        if "/" in name or name.endswith(".py"):
            file = ROOT / (name if name.startswith("distopt/") else f"{folder}/{name}")
            assert file.is_file(), name
        else:
            assert name in set(defined(file)), f"{file.name} defines no {name}"
            symbols += 1
    assert symbols, "a row names what is to be read in its files"


def test_all_rows_are_looked_at():
    assert len(ROWS) == PAGE.count("\n| ") - 2 > 50


def test_settings_are_there():
    """As ``stage.field = value``; the dataclasses judge the values."""
    named = re.findall(r"`(\w+)\.(\w+) = ([^`]+)`", PAGE)
    assert len(named) >= 5
    for room, field, value in named:
        changed = dataclasses.replace(getattr(TrainSettings(), room), **{field: ast.literal_eval(value)})
        dataclasses.replace(TrainSettings(), **{room: changed})


def test_every_paper_that_the_code_cites_is_on_the_map():
    cited = set()
    for room in ("distopt", "integrations"):
        for file in (ROOT / room).rglob("*.py"):
            cited |= set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", file.read_text()))
    mapped = set(re.findall(r"arXiv:(\d{4}\.\d{4,5})", PAGE))
    assert len(cited) > 30
    assert cited <= mapped
