"""Pages of the documentation: their code blocks, and a process of its own in which those of a page are run."""

import contextlib
import doctest
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from markdown_it import MarkdownIt

import tests.processes  # noqa: F401  it has told the fork server what to load

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Block:
    """One code block.

    Args:
        line: of its first line of code, from 1.
        language: what follows the opening fence.
        code: what lies between the fences.
        prints: what stands in a plain block directly after a Python one; empty if none does.
        is_output: it is such a plain block.
    """

    line: int
    language: str
    code: str
    prints: str = ""
    is_output: bool = False


def blocks(page: Path) -> list[Block]:
    """All code blocks of a page, indented ones too, from top to bottom."""
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    found: list[Block] = []
    for token, before, after in zip(tokens, [None, *tokens], [*tokens[1:], None], strict=False):
        if token.type == "code_block":
            found.append(Block(token.map[0] + 1, "", token.content))
        elif token.type == "fence":
            told = after.content if _is_python(token) and _is_plain(after) else ""
            found.append(
                Block(token.map[0] + 2, token.info, token.content, told, _is_plain(token) and _is_python(before))
            )
    return found


def _is_python(token) -> bool:
    return token is not None and token.type == "fence" and token.info == "python"


def _is_plain(token) -> bool:
    return token is not None and token.type == "fence" and token.info == ""


def run(page: Path, timeout: float = 280) -> list[str]:
    """Run a page's Python blocks in one namespace, a process and a temporary folder of their own.

    The process is one rank with one thread, and has loaded torch. It stops at the first block that does not do what the
    page says.

    Args:
        page: the file.
        timeout: seconds for all of it.

    Returns:
        What is wrong, each with the page and a line; empty if all is well.
    """
    with tempfile.TemporaryDirectory() as folder, _started(page, folder) as (pipe, process):
        line, troubles, deadline = 1, [], time.monotonic() + timeout
        try:
            while pipe.poll(max(0.0, deadline - time.monotonic())):
                said = pipe.recv()
                if isinstance(said, int):
                    line = said
                else:
                    troubles.append(said)
            return [*troubles, f"{_name(page)}:{line}: not finished after {timeout} seconds"]
        except EOFError:
            process.join(timeout)
        if process.exitcode != 0 and not troubles:
            troubles.append(f"{_name(page)}:{line}: its process ended with exit code {process.exitcode}")
        return troubles


@contextlib.contextmanager
def _started(page: Path, folder: str) -> Iterator[tuple[Connection, multiprocessing.Process]]:
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_main, args=(page, folder, theirs))
    process.start()
    theirs.close()
    try:
        yield ours, process
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the page has started, too
        process.join()


def _main(page: Path, folder: str, pipe: Connection) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torch.set_num_threads(1)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    with tempfile.TemporaryFile("w+") as printed:
        os.dup2(printed.fileno(), 1)
        for block in blocks(page):
            if block.language == "python":
                pipe.send(block.line)
                if trouble := _trouble(page, block, main, printed):
                    pipe.send(trouble)
                    break
    if dist.is_initialized():
        dist.destroy_process_group()


def _trouble(page, block, main, printed) -> str:
    printed.seek(0)
    printed.truncate()
    try:
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), main.__dict__)
    except BaseException as error:
        lines = [entry.lineno for entry in traceback.extract_tb(error.__traceback__) if entry.filename == str(page)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1]
        return f"{_name(page)}:{line}: {''.join(traceback.format_exception(error))}"
    sys.stdout.flush()
    printed.seek(0)
    got = printed.read()
    if doctest.OutputChecker().check_output(block.prints, got, doctest.ELLIPSIS):
        return ""
    return (
        f"{_name(page)}:{block.line}: the page says that this prints\n{block.prints or '(nothing)'}\nbut it is\n{got}"
    )


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
