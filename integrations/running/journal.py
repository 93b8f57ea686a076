"""What a person sees of a run while it goes on: progress bars on a terminal, plain lines in a log, TensorBoard events.

Only rank 0 shows anything; the journals of the other ranks take their values and stay silent.
"""

import contextlib
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from . import events

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
        self._folder = folder / "tensorboard" if folder is not None and shown else None
        self._writer: SummaryWriter | None = None

    def begin(self, done: Mapping[str, int] | None = None) -> None:
        """Open the file of events, without the curves of an earlier run, or of steps that are taken again.

        Args:
            done: the stages of which events are kept, and up to which step.
        """
        if self._folder is not None and self._writer is None:
            events.keep(self._folder, done or {})
            self._writer = SummaryWriter(str(self._folder))

    def say(self, line: str) -> None:
        """Show one line."""
        if self._shown:
            self._console.print(line, markup=False)
            self._console.file.flush()

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator["Stage"]:
        """Show the steps of one stage: a bar on a terminal, about twenty lines elsewhere."""
        self.begin()
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
        self._first: int | None = None

    def log(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Take the values of step ``step`` of ``total``, counted from 1; a name with a slash makes a curve, no text."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{self._name}/{name}", value, step)
        if self._bar is not None and self._task is not None:
            if self._first is None:
                # The time that is left is reckoned from the steps of this process, not from those before a restart.
                self._bar.reset(self._task, completed=step - 1, total=total, values="")
            self._bar.update(self._task, completed=step, total=total, values=_format(values, limit=3))
        self._first = step if self._first is None else self._first
        if self._lines is not None and self._due(step, total):
            seconds = time.monotonic() - self._began
            self._lines.say(f"{self._name}  step {step}/{total}  {_format(values)}  {seconds:.0f} s")

    def show(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Tensor]) -> None:
        """Make curves of figures, and a sheet of each name's pictures ``(n, 3, H, W)`` in [0, 1], four a row."""
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(f"{self._name}/{name}", value, step)
        for name, each in pictures.items():
            self._writer.add_image(f"{self._name}/{name}", _sheet(each), step)

    def _due(self, step: int, total: int) -> bool:
        now = time.monotonic()
        part = step * _LINES_A_STAGE // total
        if step == self._first or part > self._told or now - self._last > _SECONDS_BETWEEN_LINES:
            self._told, self._last = part, now
            return True
        return False


def _sheet(pictures: Tensor, columns: int = 4, enlarged: int = 4) -> Tensor:
    """Lay pictures out in rows, each pixel as a square of pixels; ``(3, H, W)``."""
    count, channels, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = torch.ones(rows * columns, channels, height + 1, width + 1)
    sheet[:count, :, :height, :width] = pictures.detach().float().cpu().clamp(0, 1)
    laid = sheet.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return laid.repeat_interleave(enlarged, 1).repeat_interleave(enlarged, 2)


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
