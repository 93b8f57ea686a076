"""The tests of what runs on a GPU, on the GPU: a process a file, several at once, as they wait for compilers."""

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.stamp import ROOT

PATHS = ("tests/kernels", "tests/cuda")
_NEEDED = ("pytest", "hypothesis")
_AT_ONCE = 6


def check(seconds: float, logs: Path, paths: Sequence[str] = PATHS) -> Iterator[dict[str, Any]]:
    """Run the tests; what has not ended in time is ended, and its tests so far count.

    Args:
        seconds: for all of them together.
        logs: the folder that their words go to.
        paths: of tests, from the root of the repository.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        yield {"part": "checks", "said": f"not run: {' and '.join(missing)} not installed"}
        return
    until = time.monotonic() + seconds
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running = _files(paths), list[tuple[str, Path, subprocess.Popen[bytes]]]()
    while waiting or running:
        while waiting and len(running) < _AT_ONCE and time.monotonic() < until:
            file = waiting.pop(0)
            log = logs / f"{Path(file).stem}.log"
            running.append((file, log, _started(file, log)))
        if time.monotonic() >= until:
            for *_, process in running:
                process.kill()
            yield from ({"part": "checks", "file": file, "passed": False, "said": "left out"} for file in waiting)
            waiting = []
        ended = [each for each in running if _over(each[2])]
        running = [each for each in running if each not in ended]
        for file, log, process in ended:
            yield outcome(file, log.read_text(encoding="utf-8", errors="replace"), process.returncode)


def outcome(file: str, text: str, code: int) -> dict[str, Any]:
    r"""What became of a file of tests.

    Args:
        file: its path.
        text: what pytest said, a line a test.
        code: its exit code; 5 says that there was nothing to run.

    Example:
        >>> outcome("a.py", "a.py::test_b FAILED\na.py::test_c PASSED\n", -9)["said"]
        '1 passed, 1 failed, ended before its end'
    """
    failed = re.findall(r"^(\S+) (?:FAILED|ERROR)", text, re.MULTILINE)
    said = f"{len(re.findall(r' PASSED', text))} passed, {len(failed)} failed"
    late = ", ended before its end" if code < 0 else ""
    broken = ", could not be run" if code not in (0, 1, 5) and not late else ""
    return {
        "part": "checks",
        "file": file,
        "passed": code in (0, 5),
        "said": said + late + broken,
        "failed": failed[:20],
    }


def _files(paths: Sequence[str]) -> list[str]:
    """Files of tests under some paths, the longest first."""
    found = [f for p in paths for f in ([ROOT / p] if (ROOT / p).is_file() else sorted((ROOT / p).glob("test_*.py")))]
    return [str(f.relative_to(ROOT) if f.is_relative_to(ROOT) else f) for f in sorted(found, key=_size, reverse=True)]


def _size(path: Path) -> int:
    return path.stat().st_size


def _started(file: str, log: Path) -> "subprocess.Popen[bytes]":
    # Options that ask for plugins are left out, as what is not installed is done without; tests that only compile, too.
    plain = ["-v", "--tb=short", "-o", "addopts=", "-o", "markers=timeout: of pytest-timeout", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plain, "-k", "not compiles", file]
    with log.open("w", encoding="utf-8") as words:
        return subprocess.Popen(command, cwd=ROOT, stdout=words, stderr=subprocess.STDOUT)


def _over(process: "subprocess.Popen[bytes]") -> bool:
    """Whether it has ended; waits a little for it."""
    try:
        process.wait(0.2)
    except subprocess.TimeoutExpired:
        return False
    return True
