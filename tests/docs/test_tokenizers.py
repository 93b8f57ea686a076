"""The examples in docs/tokenizers.md run and print what stands below them; its tables are of every kind."""

import contextlib
import io
import re
from pathlib import Path

from distopt.integrations.tokenizers.settings import NAMES
from distopt.integrations.tokenizers.sweeps import COMPARED

PAGE = (Path(__file__).parent.parent.parent / "docs/tokenizers.md").read_text()


def test_the_examples():
    names = {}
    blocks = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```python") == 2
    for code, told in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue() == told


def test_every_kind_has_its_formula_and_every_row_its_figures():
    assert all(f"| `{name}` |" in PAGE for name in NAMES)
    assert all(f"| {name} |" in PAGE for name in COMPARED)
