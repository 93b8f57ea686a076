"""The tables in docs/tokenizers.md are of every kind."""

from pathlib import Path

from distopt.integrations.tokenizers.settings import NAMES
from distopt.integrations.tokenizers.sweeps import COMPARED

PAGE = (Path(__file__).parent.parent.parent / "docs/tokenizers.md").read_text()


def test_every_kind_has_its_formula_and_every_row_its_figures():
    assert all(f"| `{name}` |" in PAGE for name in NAMES)
    assert all(f"| {name} |" in PAGE for name in COMPARED)
