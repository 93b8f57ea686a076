"""The Python that README.md and the pages of docs/ show is run, and prints what stands below it."""

import ast
import textwrap

import pytest

from tests.docs.pages import PAGES, ROOT, blocks, run

pytestmark = pytest.mark.timeout(300)
"""A page may start processes of its own, which load torch, on a machine with other work."""
LANGUAGES = {"python", "", "diff", "bash", "console", "text", "toml", "yaml", "json", "{toctree}", "{eval-rst}"}
"""Python goes under no other name than the one that is run."""


def page_id(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=page_id)
def test_a_page_does_what_it_says(page):
    troubles = run(page)
    assert not troubles, "\n".join(troubles)


def is_python(code):
    """It could be run, and would do something: a row of words and numbers would not."""
    try:
        statements = ast.parse(textwrap.dedent(code)).body
    except SyntaxError:
        return False
    passive = (ast.Name, ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.BinOp, ast.UnaryOp, ast.Compare)
    return any(not isinstance(s, ast.Expr) or not isinstance(s.value, passive) for s in statements)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_all_python_is_run(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, (
            f"{page_id(page)}:{block.line}: no language of these pages: {block.language}"
        )
        if block.language in ("", "text") and not block.is_output:
            assert not is_python(block.code), (
                f"{page_id(page)}:{block.line}: Python that is not run: begin it ```python"
            )


DIFFS = [page for page in PAGES if "```diff" in page.read_text() and page.parent.name != "clients"]
"""Those of the clients are applied to files, which are run, in `test_clients.py`."""


@pytest.mark.parametrize("page", DIFFS, ids=page_id)
def test_what_a_diff_leads_to_is_sound(page):
    """It is Python; `...` may stand for arguments that are left out."""
    for block in blocks(page):
        if block.language == "diff" and ".toml" not in block.code:
            after = [line[1:] for line in block.code.splitlines() if not line.startswith(("-", "@@"))]
            try:
                ast.parse(textwrap.dedent("\n".join(after)).replace(", ...)", ")"))
            except SyntaxError as error:
                pytest.fail(f"{page_id(page)}:{block.line}, line {error.lineno} after: {error.msg}: {error.text}")


GOOD = """# A page

```python
import os
x = 1
```
Words.
```python
print(x + 1, os.listdir())
```

```
2 []
```

* indented, in a list:

  ```python
  print("1.25 seconds")
  os.system("echo from another process")
  ```
  ```
  ... seconds
  from another process
  ```

```bash
python this is not
```
"""
RANKS = """
```python
import torch.multiprocessing


def rank(number):
    print("rank", number, flush=True)


if __name__ == "__main__":
    torch.multiprocessing.start_processes(rank, nprocs=1, start_method="fork")
```
```
rank 0
```
"""
BAD = {
    "raises": ("\n```python\nx = 1\n```\n\n```python\ny = 2\n\nz = 1 / 0\n```\n", "page.md:9: Traceback", "ZeroDivision"),
    "raises within a call": ("```python\ndef f():\n    return 1 / 0\n\n\nf()\n```\n", "page.md:3: Tr", "ZeroDivision"),
    "is no Python": ("```python\nx = 1\ny =\n```\n", "page.md:3: ", "SyntaxError"),
    "prints another thing": ("```python\nprint(1)\nprint(2)\n```\n```\n1\n3\n```\n", "page.md:2: ", "1\n3\n\nbut it is\n1\n2"),
    "prints in secret": ("```python\nprint(1)\n```\nWords.\n```\n1\n```\n", "page.md:2: ", "(nothing)\nbut it is\n1"),
    "prints nothing": ("```python\nx = 1\n```\n```\n1\n```\n", "page.md:2: ", "1\n\nbut it is\n"),
    "has a namespace of its own": ("```python\nprint(run)\n```\n", "page.md:2: Traceback", "NameError"),
    "ends": ("```python\nimport sys\n\nsys.exit(0)\n```\n", "page.md:4: Traceback", "SystemExit"),
    "dies": ("```python\nx = 1\n```\n```python\nimport os\n\nos._exit(3)\n```\n", "page.md:5: ", "exit code 3"),
}  # fmt: skip


@pytest.mark.parametrize("text", [GOOD, RANKS])
def test_a_sound_page(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    assert run(page) == []


@pytest.mark.parametrize(("text", "place", "told"), BAD.values(), ids=BAD)
def test_a_bad_page_is_told_with_its_line(text, place, told, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text)
    (trouble,) = run(page)
    assert trouble.startswith(place)
    assert told in trouble


def test_a_page_that_hangs_is_ended(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nimport subprocess\n\nsubprocess.run(['sleep', '1000'])\n```\n")
    (trouble,) = run(page, timeout=2)
    assert trouble == "page.md:2: not finished after 2 seconds"


@pytest.mark.parametrize("code", ["x = f(1)", "import distopt", "model(x)", "    model(x)  # indented\n", "y += 1"])
def test_python_is_known_by_its_looks(code):
    assert is_python(code)


def test_what_is_no_python_is_left_alone():
    assert not any(map(is_python, ["1 2 3 and words", "make demo", "(2, 5, 8), 1", "a_name", "x -> y", ""]))


def test_the_readme_comes_to_the_point():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 100
    assert lines.index("```python") < 15
