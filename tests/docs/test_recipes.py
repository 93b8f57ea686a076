"""What docs/recipes.md says of files is so."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/recipes.md").read_text()


def test_pictures_and_files_are_there():
    named = re.findall(r"!\[[^]]*\]\((\w+\.png)\)", PAGE)
    assert named
    for name in named:
        assert (ROOT / "docs" / name).exists(), name
    for name in re.findall(r"(?:integrations|docs|tests)/[\w/]+\.\w+", PAGE):
        assert (ROOT / name).exists(), name
    lines = len((ROOT / "integrations/recipes/trainer.py").read_text().splitlines())
    assert f"a file of {lines} lines" in PAGE
