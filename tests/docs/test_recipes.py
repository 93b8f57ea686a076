"""The examples in docs/recipes.md print what stands below them, and what it says of files is so."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/recipes.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_every_example_is_run():
    assert len(EXAMPLES) == PAGE.count("```python") == 3


@pytest.mark.parametrize(("code", "told"), EXAMPLES)
@pytest.mark.usefixtures("one_rank")
def test_the_examples(code, told):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "example"})
    assert printed.getvalue() == told


def test_pictures_and_files_are_there():
    named = re.findall(r"!\[[^]]*\]\((\w+\.png)\)", PAGE)
    assert named
    for name in named:
        assert (ROOT / "docs" / name).exists(), name
    for name in re.findall(r"(?:integrations|docs|tests)/[\w/]+\.\w+", PAGE):
        assert (ROOT / name).exists(), name
    lines = len((ROOT / "integrations/recipes/trainer.py").read_text().splitlines())
    assert f"a file of {lines} lines" in PAGE
