"""Puts tables between their marks on the pages of the documentation, so that no figure there is written by hand.

A mark is a pair of lines, ``<!-- NAME -->`` and ``<!-- end of NAME -->``. What stands between them is replaced; the
prose around them is a person's.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.listed import Bench

_STAMP = ("machine", "threads", "torch", "python", "distopt", "commit")


class PageError(Exception):
    """A mark on a page has no end."""


def fill(page: str, tables: Mapping[str, str]) -> str:
    r"""Replace what stands between marks; a table whose mark the page has not is left out.

    Args:
        page: its text.
        tables: by their marks.

    Raises:
        PageError: if a mark has no end.

    Example:
        >>> fill("Before <!-- a -->\nold\n<!-- end of a --> after", {"a": "new", "b": "elsewhere"})
        'Before <!-- a -->\nnew\n<!-- end of a --> after'
    """
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, mark, rest = page.partition(begin)
        if not mark:
            continue
        # Right after the first mark the last one may stand at once: an empty place.
        _, mark, after = f"\n{rest}".partition(end)
        if not mark:
            raise PageError(f"the mark {begin.strip()} has no end")
        page = before + begin + table + end + after
    return page


def stamp_line(records: Iterable[Mapping[str, Any]]) -> str:
    """What the records were measured on, in one line.

    Example:
        >>> stamp_line([{"machine": "Linux x86_64, 2 cores", "torch": "2.13.0", "commit": "abc1234"}])
        '<sub>Linux x86_64, 2 cores; torch 2.13.0; commit abc1234</sub>'
    """
    found = dict.fromkeys(tuple(_stamp(record)) for record in records)
    return "<br>".join(f"<sub>{'; '.join(stamp)}</sub>" for stamp in found)


def _stamp(record: Mapping[str, Any]) -> Iterable[str]:
    for name in _STAMP:
        if record.get(name) is not None:
            yield str(record[name]) if name == "machine" else f"{name} {record[name]}"


def render(benches: Sequence[Bench], folder: Path, docs: Path) -> list[str]:
    """Bring the pages up to date with the last results. Where there are none, tables stay as they are.

    Args:
        benches: whose results.
        folder: where these lie, as JSON lines.
        docs: where the pages are, and pictures go.

    Returns:
        Marks that no page has.

    Raises:
        PageError: if a mark has no end; no page is changed then.
    """
    tables: dict[str, str] = {}
    drawn: list[tuple[Bench, list[dict[str, Any]]]] = []
    for bench in benches:
        if records := bench.records(folder):
            stamp = stamp_line(records)
            tables |= {name: f"{table}\n\n{stamp}" for name, table in bench.tables(records).items()}
            drawn.append((bench, records))
    before = {path: path.read_text(encoding="utf-8") for path in sorted(docs.glob("*.md"))}
    after = {path: fill(text, tables) for path, text in before.items()}
    for path, text in after.items():
        if text != before[path]:
            path.write_text(text, encoding="utf-8")
    for bench, records in drawn:
        bench.pictures(records, docs)
    return [name for name in tables if not any(f"<!-- {name} -->" in text for text in after.values())]
