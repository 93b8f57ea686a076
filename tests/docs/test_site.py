"""The site is built without a warning, its links lead somewhere, and every public name is on one page of the reference."""

import ast
import importlib
import io
import re
import shutil
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest
from sphinx.application import Sphinx

import distopt
from tests.docs.pages import PAGES, ROOT, blocks
from tests.processes import run_mortals

pytestmark = pytest.mark.timeout(900)
ROOMS = ("checkpoint", "optim", "scaling")


@dataclass(frozen=True)
class Site:
    """What was built.

    Args:
        folder: its HTML.
        warnings: what Sphinx said.
        documented: the page of every object in the reference, by its name.
    """

    folder: Path
    warnings: str
    documented: dict[str, str]


def build_job(rank, say, folder, source, target):
    """In a process that ends, as Sphinx keeps what it was told, and that has loaded torch."""
    warnings = io.StringIO()
    app = Sphinx(source, source, target, f"{folder}/doctrees", "html", status=None, warning=warnings)
    app.build()
    objects = app.env.domains["py"].objects
    say((warnings.getvalue(), {name: entry.docname for name, entry in objects.items() if not entry.aliased}))


def build(source, target):
    (fate,) = run_mortals(1, build_job, source, target, timeout=850)
    assert not fate.error
    warnings, documented = fate.said[0]
    return Site(target, re.sub(r"\x1b\[[\d;]*m", "", warnings), documented)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build(ROOT / "docs", tmp_path_factory.mktemp("site"))


def test_it_is_built_without_a_warning(site):
    assert site.warnings == ""


def test_warnings_are_given(tmp_path):
    """Of what goes wrong easily: a link to nowhere, a name that is not there, a page that nobody finds."""
    shutil.copy(ROOT / "docs/conf.py", tmp_path)
    (tmp_path / "index.md").write_text("# A\n\n[gone](gone.md)\n\n```{eval-rst}\n.. autofunction:: distopt.gone\n```\n")
    (tmp_path / "alone.md").write_text("# B\n\n[below](index.md#gone)\n")
    warnings = build(tmp_path, tmp_path / "html").warnings
    for told in (
        "not found: 'gone.md'",
        "import 'gone' from",
        "not found in doc 'index': 'gone'",
        "included in any toctree",
    ):
        assert told in warnings


def test_what_pages_link_to_is_there(site):
    pages = sorted(site.folder.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        for link in re.findall(r'(?:href|src)="([^"]*)"', page.read_text()):
            file = unquote(unescape(link).partition("#")[0].partition("?")[0])
            if file and not re.match(r"\w+:", file):
                assert (page.parent / file).exists(), f"{page.relative_to(site.folder)}: {link}"


def slugs(page):
    """What follows the # in links to a page's headings, on GitHub."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("[A-Z]*.md")], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_on_github(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(<?([^)>\s]+)>?\)", text):
        if not re.match(r"\w+:", link):
            name, _, fragment = link.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), link
            assert not fragment or fragment in slugs(file), link


def public_names():
    """What is listed, and what comes from a module that Python on a page imports from, by where it is found."""
    yield from (f"distopt.{name}" for name in dir(distopt) if name not in (*ROOMS, "__version__"))
    for room in ROOMS:
        module = importlib.import_module(f"distopt.{room}")
        tree = ast.parse(Path(module.__file__).read_text())
        aliases = (alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names)
        yield from (f"distopt.{room}.{alias.asname}" for alias in aliases)
    for page in PAGES:
        for block in blocks(page):
            nodes = ast.walk(ast.parse(block.code)) if block.language == "python" else ()
            for node in nodes:
                if isinstance(node, ast.ImportFrom) and node.module.startswith("distopt."):
                    yield from (f"{node.module}.{alias.name}" for alias in node.names)


def found(name):
    """The object of that name; a module, or something in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        room, _, last = name.rpartition(".")
        owner = found(room)
        return getattr(owner, last)


def is_same(one, other):
    """Names of integrations stand in one place only, and their packages take long to import."""
    if one == other or any(name.startswith("distopt.integrations.") for name in (one, other)):
        return one == other
    return found(one) is found(other)


@pytest.mark.parametrize("name", sorted(set(public_names())))
def test_a_public_name_is_on_one_page_of_the_reference(site, name):
    last = name.rpartition(".")[2]
    pages = [page for other, page in site.documented.items() if other.endswith(f".{last}") and is_same(other, name)]
    assert len(pages) == 1, pages
    assert pages[0].startswith("api/")
