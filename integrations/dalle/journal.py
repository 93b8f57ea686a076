"""What a person sees of a run while it goes on: progress bars on a terminal, plain lines in a log, TensorBoard events.

Only rank 0 shows anything; the journals of the other ranks take their values and stay silent.
"""

import contextlib
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

_LINES_A_STAGE = 20
_SECONDS_BETWEEN_LINES = 60.0


class RunJournal:
    """The journal of a run.

    Args:
        folder: where ``tensorboard/`` is written; ``None`` writes no events.
        shown: whether to show anything: rank 0 does.
        stream: where lines go.

    Example:
        >>> with RunJournal(None).stage("stage 1") as stage:
        ...     stage.log(1, 1, {"loss": 0.5})
        stage 1  step 1/1  loss 0.5  0 s
    """

    def __init__(self, folder: Path | None, *, shown: bool = True, stream: TextIO | None = None) -> None:
        self._shown = shown
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._writer = None
        if folder is not None and shown:
            # Events of an earlier run in the same folder would be drawn into the same curves.
            for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
                old.unlink()
            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def say(self, line: str) -> None:
        """Show one line."""
        if self._shown:
            self._console.print(line, markup=False)
            self._console.file.flush()

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator["Stage"]:
        """Show the steps of one stage: a bar on a terminal, about twenty lines elsewhere."""
        if not self._shown:
            yield Stage(name, None, None, None)
        elif self._console.is_terminal:
            with _bar(self._console) as bar:
                yield Stage(name, self._writer, None, bar)
        else:
            yield Stage(name, self._writer, self, None)
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Write what is left of the events."""
        if self._writer is not None:
            self._writer.close()


class Stage:
    """One stage's part of the journal; what ``Context.journal`` is."""

    def __init__(self, name: str, writer: SummaryWriter | None, lines: RunJournal | None, bar: Progress | None) -> None:
        self._name, self._writer, self._lines, self._bar = name, writer, lines, bar
        self._task = None if bar is None else bar.add_task(name, total=None, values="")
        self._began = self._last = time.monotonic()
        self._told = 0

    def log(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Take the values of step ``step`` of ``total``, counted from 1; a name with a slash makes a curve, no text."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{self._name}/{name}", value, step)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, total=total, values=_format(values, limit=3))
        if self._lines is not None and self._due(step, total):
            seconds = time.monotonic() - self._began
            self._lines.say(f"{self._name}  step {step}/{total}  {_format(values)}  {seconds:.0f} s")

    def _due(self, step: int, total: int) -> bool:
        now = time.monotonic()
        part = step * _LINES_A_STAGE // total
        if step == 1 or part > self._told or now - self._last > _SECONDS_BETWEEN_LINES:
            self._told, self._last = part, now
            return True
        return False


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}", style="cyan"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        expand=True,
        refresh_per_second=4,
    )


def _format(values: Mapping[str, float], limit: int | None = None) -> str:
    shown = [(name, value) for name, value in values.items() if "/" not in name]
    return "  ".join(f"{name} {value:.4g}" for name, value in shown[:limit])
