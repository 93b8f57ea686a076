"""A run's folder from one line: a registration's figures, written after the steps of its optimizer."""

import atexit
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.optim import Optimizer

from distopt.errors import MissingPackageError, SettingError
from distopt.monitor.tensorboard import Scaler, log_to_tensorboard
from distopt.reducers.reducer import Figures

if TYPE_CHECKING:
    from distopt.attach.registration import Registration


class Recorder:
    """What `record` returns: goes on by itself, and takes other scalars for the same page.

    Args:
        writer: TensorBoard's; ``None`` on all ranks but the first, where nothing is written.
        log: writes the figures of a step.
        every: steps from one point to the next.
        step: how many steps have been taken before.
    """

    def __init__(self, writer: Any, log: Callable[[int], None], every: int, step: int) -> None:
        self.step = step
        """Steps of the optimizer so far."""
        self._writer, self._log, self._every = writer, log, every
        self._last, self._began, self._warming_up = step, time.perf_counter(), True

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        """Write one number of the trainer's own, a loss for example; on other ranks than the first, do nothing.

        Args:
            tag: the curve's name.
            scalar_value: the number.
            global_step: where it stands; the number of the optimizer's steps so far if it is not given.
        """
        if self._writer is not None:
            self._writer.add_scalar(tag, scalar_value, self.step if global_step is None else global_step)

    def close(self) -> None:
        """Write what is left, and nothing more; without it, that happens when the process ends."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def after_step(self, *_: object) -> None:
        """Count a step, and write its figures if it is time; the optimizer calls it."""
        self.step += 1
        warming_up, self._warming_up = self._warming_up, False
        if self._writer is None or (self.step % self._every and not warming_up):
            return
        if not warming_up:
            seconds = (time.perf_counter() - self._began) / (self.step - self._last)
            self._writer.add_scalar("distopt/seconds_per_step", seconds, self.step)
        self._log(self.step)
        self._writer.flush()
        # What writing takes is no part of a step.
        self._last, self._began = self.step, time.perf_counter()


def record(
    registration: "Registration",
    folder: str | Path,
    optimizer: Optimizer,
    *,
    every: int = 10,
    per_layer: bool = True,
    scaler: Scaler | None = None,
    step: int = 0,
) -> Recorder:
    """Write a registration's figures into a folder, from here on, after the optimizer's steps. Not collective.

    ``distopt report FOLDER`` makes a page of it, and ``tensorboard --logdir FOLDER`` shows the same curves: what
    `log_to_tensorboard` writes, and the seconds of a step. Call it on every rank or on the first alone, which is the
    only one that writes. A step that a ``GradScaler`` leaves out is not counted.

    Args:
        registration: what ``distopt.register`` returned.
        folder: where event files go; made if it is missing.
        optimizer: whose steps are counted; it gets a hook.
        every: steps from one point on the curves to the next. A point reads the residuals once.
        per_layer: whether to write the curves of single layers.
        scaler: a `distopt.ResblockScaler` whose scales are to be written too.
        step: how many steps have been taken before, by a run that goes on.

    Returns:
        What takes scalars of your own, by ``recorder.add_scalar("loss", loss.item())``.

    Raises:
        SettingError: ``every`` is not an integer of at least 1, or ``folder`` cannot be written to.
        MissingPackageError: TensorBoard is not installed.

    Example:
        >>> import distopt, tempfile, torch
        >>> from pathlib import Path
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layer = torch.nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> registration = distopt.register(layer.named_parameters(), distopt.PowerSGD(rank=1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     recorder = distopt.record(registration, folder, optimizer)
        ...     for _ in range(20):
        ...         layer(torch.ones(2, 8)).sum().backward()
        ...         taken = registration.reduce()
        ...         optimizer.step()
        ...     recorder.close()
        ...     len(list(Path(folder).glob("events.out.tfevents.*")))
        1
        >>> dist.destroy_process_group()
    """
    if type(every) is not int or every < 1:
        raise SettingError("every", every, "an integer of at least 1")
    writer: Any = _writer(folder) if not dist.is_initialized() or dist.get_rank() == 0 else None
    seen: Mapping[str, Figures] = {}

    def log(step: int) -> None:
        nonlocal seen
        before, seen = seen, registration.figures()
        # Between two measured steps the layers have nothing new to tell.
        fresh = per_layer and seen != before
        log_to_tensorboard(registration, writer, step, per_layer=fresh, scaler=scaler)

    recorder = Recorder(writer, log, every, step)
    optimizer.register_step_post_hook(recorder.after_step)
    atexit.register(recorder.close)
    return recorder


def _writer(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingPackageError("tensorboard", "report") from None
    try:
        return SummaryWriter(str(folder))
    except OSError as error:
        raise SettingError("folder", str(folder), f"a folder that can be written to ({error.strerror})") from None
